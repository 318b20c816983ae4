"""The repository's own files: sizes, forbidden constructs, and that its lists of names agree with each other."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
CODE = ("src", "tests", "benchmarks", "scripts", "docker")
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_STAGE_LINES = 300, 60, 80
FILES = sorted(file for folder in CODE for file in (ROOT / folder).rglob("*.py"))
PRODUCT = [file for file in FILES if file.relative_to(ROOT).parts[0] != "tests"]
PINNED_FILES = ("data", "train", "export", "pipeline", "serve", "remotes", "dev", "build")


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    found = [line.split("#")[0].split(" --hash")[0].strip() for line in lines]
    return dict(line.split("==") for line in found if line)


def canonical(versions: dict[str, str]) -> dict[str, str]:
    return {canonicalize_name(name): version for name, version in versions.items()}


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_file_and_function_lengths(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    stage = file.parent.name == "stages" and "src" in file.parts
    assert len(text.splitlines()) <= (MAX_STAGE_LINES if stage else MAX_FILE_LINES)
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node.name: (node.end_lineno or node.lineno) - node.lineno + 1 for node in functions}
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES} == {}


def caught(handler: ast.ExceptHandler) -> list[str]:
    if handler.type is None:
        return ["everything"]
    types = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return [ast.unparse(node) for node in types]


def forbidden(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield f"line {node.lineno}: print"
        if isinstance(node, ast.ExceptHandler):
            broad = {"everything", "Exception", "BaseException"}.intersection(caught(node))
            yield from (f"line {node.lineno}: except {name}" for name in broad)


@pytest.mark.parametrize("file", PRODUCT, ids=relative)
def test_no_print_and_no_broad_except(file: Path) -> None:
    assert list(forbidden(ast.parse(file.read_text(encoding="utf-8")))) == []


def test_the_search_for_forbidden_constructs_finds_them() -> None:
    tree = ast.parse("print(1)\ntry:\n    pass\nexcept (OSError, Exception):\n    pass\n")
    assert list(forbidden(tree)) == ["line 1: print", "line 4: except Exception"]


def test_make_help_lists_every_target() -> None:
    shown = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    listed = [line.split()[1] for line in shown.splitlines()]
    declared = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert declared is not None
    assert sorted(listed) == sorted(declared[1].split())
    assert {"help", "setup", "repro", "test", "lint", "chat", "mlflow", "recipe"} <= set(listed)


def make(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run lines of the Makefile in another folder, with this Python and without its setup."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT / "src"), **environment}
    command = ["make", "--no-print-directory", "-C", str(folder), "-f", str(ROOT / "Makefile"), "-o", "setup"]
    return subprocess.run([*command, *arguments], env=variables, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (("chat",), "the Modelfile is missing\n  where:  models/ollama/Modelfile"),
        (("summary",), "no metrics\n  where:  metrics"),
        (("report",), "ParamsError: file is missing"),
        (("doctor",), "params.yaml"),
        (("lineage", "FILE=x.gguf"), "the GGUF file is missing\n  where:  x.gguf"),
        (("serve",), "the Modelfile is missing\n  where:  models/ollama/Modelfile"),
        (("ollama",), "the Modelfile is missing\n  where:  models/ollama/Modelfile"),
        (("promote",), "ParamsError: file is missing"),
        (("promote", "NAME=a", "VERSION=b@c"), "a version is name@alias or name/number"),
        (("pull", "NAME=a@b"), "there is no registry"),
        (("rebuild", "VERSION=a/1"), "there is no registry"),
        (("gc",), "not a git repository, so no commit can be found"),
        (("recipe", "NAME=smoke"), "params.yaml is now the recipe smoke"),
        (("pin", "NAME=smoke"), "recipes/smoke/params.yaml: 0 of 0 Hub revisions changed"),
    ],
)
def test_a_program_takes_the_arguments_that_make_gives_it(
    tmp_path: Path, arguments: tuple[str, ...], answer: str
) -> None:
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    done = make(tmp_path, *arguments)
    assert answer in done.stdout + done.stderr


def test_every_program_in_the_makefile_is_tried() -> None:
    programs = set(re.findall(r"python -m (finetune\.\w+)", (ROOT / "Makefile").read_text()))
    tried = {"chat", "cleanup", "doctor", "ollama", "origin", "pin", "pull", "rebuild", "recipes", "run_report"}
    tried |= {"serve", "summary", "tracking"}
    assert programs == {f"finetune.{name}" for name in tried}


@pytest.mark.parametrize("address", ["https://ann:hun/t@er2@host:5000", "postgresql://ann:hunter2@host/db"])
def test_make_mlflow_shows_no_password_and_gives_none_as_an_argument(tmp_path: Path, address: str) -> None:
    program = tmp_path / ".venv" / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\necho "python $*"\necho "$MLFLOW_BACKEND_STORE_URI" > backend\n')
    program.chmod(0o755)
    done = make(tmp_path, "mlflow", MLFLOW_TRACKING_URI=address, DISPLAY="", WAYLAND_DISPLAY="")
    assert done.returncode == 0, done.stderr
    assert not {"ann", "hun", "er2"} & set(re.findall(r"ann|hun|er2", done.stdout + done.stderr))
    if address.startswith("https"):
        assert "python -m webbrowser https://host:5000/#/models" in done.stdout
    else:
        assert (tmp_path / "backend").read_text().strip() == address


@pytest.mark.parametrize("name", PINNED_FILES)
def test_every_direct_pin_is_the_locks(name: str) -> None:
    lock = canonical(pins("lock"))
    direct = canonical(pins(name))
    assert direct != {}
    assert direct == {package: lock.get(package) for package in direct}


def test_the_compiled_source_archive_is_the_pinned_release() -> None:
    assert pins("llama-sdist") == {"llama-cpp-python": pins("export")["llama-cpp-python"]}


def test_every_runtime_bound_has_its_reason() -> None:
    for name in ("data", "train", "export", "pipeline", "serve"):
        lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
        assert [line for line in lines if "==" in line and "  #" not in line] == []


def test_the_lock_names_only_the_cuda_packages_that_torch_leaves_open() -> None:
    cuda = [name for name in canonical(pins("lock")) if name.startswith(("nvidia-", "cuda-")) or name == "triton"]
    # nvidia-ml-py is no part of CUDA: it asks the driver, and is pinned by requirements/pipeline.txt.
    assert cuda == ["cuda-bindings", "cuda-pathfinder", "nvidia-ml-py", "nvidia-nvjitlink"]


def needed(name: str, extras: frozenset[str], seen: set[tuple[str, frozenset[str]]]) -> None:
    """Collect the installed closure of one requirement, CUDA packages apart (torch pins them itself)."""
    # Python brings a pip of its own into an environment.
    if (name, extras) in seen or name.startswith(("nvidia-", "cuda-")) or name in ("triton", "pip"):
        return
    seen.add((name, extras))
    for text in importlib.metadata.requires(name) or []:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras | {""}):
            needed(canonicalize_name(requirement.name), frozenset(requirement.extras), seen)


def test_the_installed_environment_is_the_lock() -> None:
    lock = canonical(pins("lock"))
    closure: set[tuple[str, frozenset[str]]] = set()
    for name in PINNED_FILES:
        for package in canonical(pins(name)):
            needed(package, frozenset(), closure)
    installed = {name: importlib.metadata.version(name).split("+")[0] for name, _ in closure}
    assert {name: (version, lock.get(name)) for name, version in installed.items() if version != lock.get(name)} == {}


@pytest.mark.parametrize(
    ("path", "ignored"),
    [
        ("dvc.lock", False),
        ("metrics/evaluate.json", False),
        ("plots/funnel.csv", False),
        ("data/sample/chat_fr.chatml", False),
        ("data/raw/x", True),
        ("models/gguf/x", True),
        ("mlflow.db", True),
        ("report/index.html", True),
        ("data/quantization/samples.jsonl", True),
        (".venv/x", True),
        (".tools/x", True),
    ],
)
def test_git_ignores_outs_and_tools_and_nothing_else(path: str, ignored: bool) -> None:
    command = ["git", "check-ignore", "--quiet", "--no-index", path]
    assert (subprocess.run(command, cwd=ROOT, check=False).returncode == 0) is ignored


def test_dockerfiles_use_nothing_that_buildah_cannot_build() -> None:
    for file in (ROOT / "docker").rglob("Dockerfile"):
        lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
        assert [line for line in lines if "<<" in line or "--link" in line] == []


def test_shell_entry_points_are_executable() -> None:
    for path in (".ci/run", "docker/entrypoint.sh"):
        assert (ROOT / path).stat().st_mode & 0o111 == 0o111
