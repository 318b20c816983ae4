"""A documented command -> why it cannot be typed as it stands: its targets, stages, modules, files and variables."""

from __future__ import annotations

import ast
import re
import shlex
from contextlib import suppress

from documented_commands import PROVEN_BY
from dvc.cli import DvcParserError
from dvc.cli.parser import get_main_parser
from pipeline_files import ROOT, module_file, stages
from ruamel.yaml import YAML

ELSEWHERE = (
    "ollama run",
    "python -m mlflow models serve ",
    "python -m mlflow server ",
    ". .venv/bin/activate",
    "cp -r recipes/smoke ",
    "export ",
    "unset MLFLOW_",
)
# Programs that take a file of distributed/; test_distributed.py holds the files to them.
SCHEDULERS = ("mkdir", "sbatch", "kubectl", "sky")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def fault(command: str) -> str | None:
    """Why a documented command cannot be typed, or None."""
    words = shlex.split(command)
    while re.match(r"[A-Z_]+=", words[0]):
        del words[0]
    tool, rest = words[0], words[1:]
    if command.startswith(ELSEWHERE):
        return None
    if tool == "make":
        return make_fault(rest)
    if tool == "dvc":
        unknown = [word for word in rest[1:] if word[0] not in "-." and rest[0] == "repro" and word not in stages()]
        return f"no stage {unknown}" if unknown else None if dvc_reads(rest) else "dvc does not read it"
    if tool == "python" and rest[0] == "-c":
        return None if ast.parse(rest[1]) else "empty"
    if tool == "python":
        known = module_file(rest[1]) if rest[0] == "-m" else (ROOT / rest[0]).is_file()
        return None if known else f"no module or file {rest}"
    if tool == "docker":
        files = [rest[at + 1] for at, word in enumerate(rest) if word == "-f"]
        services = YAML(typ="safe", pure=True).load(read("docker/compose.yaml"))["services"]
        missing = [file for file in files if not (ROOT / file).is_file()]
        return None if rest[-1] in services and not missing else f"no service {rest[-1]}, or no file {missing}"
    if tool in SCHEDULERS:
        files = [word for word in rest if re.search(r"\.(yaml|sbatch|sh)$", word)]
        missing = [file for file in files if not (ROOT / file).is_file()]
        return None if files and not missing else f"no file {missing}"
    name = YAML(typ="safe", pure=True).load(read("params.yaml"))["register"]["model_name"]
    known = ["ollama", "create", name, "-f", "models/ollama/Modelfile"]
    return None if words == known[: len(words)] else "not known to this test"


def dvc_reads(words: list[str]) -> bool:
    """Whether DVC's own parser takes the words; test_docs_commands.py runs those of the blocks."""
    # In a sentence the last words may be left out.
    for more in ([], ["x"], ["x", "x"], ["x", "x", "x"]):
        with suppress(DvcParserError, SystemExit):
            get_main_parser().parse_args([*words, *more])
            return True
    return False


def make_fault(words: list[str]) -> str | None:
    for word in words:
        variable = word.split("=")[0]
        if "=" in word and f"$({variable})" not in read("Makefile"):
            return f"the Makefile does not read {variable}"
        if "=" not in word and (not re.search(rf"^{word}:", read("Makefile"), re.MULTILINE) or word not in PROVEN_BY):
            return f"no target {word}, or PROVEN_BY lacks it"
    return None
