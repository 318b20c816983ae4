"""A Modelfile -> the commands that give it to Ollama; where Ollama is installed they are run, and a question is asked.

    python -m finetune.ollama models/ollama/Modelfile [--ask "question"]

Without Ollama the commands alone are the answer, and no error: the machine that trains a model is often not the one
that serves it. Of Ollama's own program the output of `--version` is read, as version 0.33 writes it.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from finetune.errors import ExportError, FinetuneError
from finetune.export.modelfile import read_modelfile
from finetune.lineage import without_passwords
from finetune.log import logger, printable, setup_logging
from finetune.params import load_params

PARAMS_FILE = Path("params.yaml")
PROGRAM = "ollama"
QUESTION = "Bonjour !"
# The server's version; where no server answers, there is a warning and the client's version instead.
SERVER_VERSION = re.compile(r"^ollama version is v?(\d+)\.(\d+)\.(\d+)", re.MULTILINE)
DEFAULT_HOST = "127.0.0.1:11434"


def commands(name: str, modelfile: Path) -> list[list[str]]:
    """What a person types to make the model `name`, and to talk to it."""
    return [[PROGRAM, "create", name, "-f", str(modelfile)], [PROGRAM, "run", name]]


def check_server(requires: str) -> None:
    """Raise ExportError unless a server answers, of version `requires` ("0.30.0") or later; "" is any version."""
    said = _run([PROGRAM, "--version"]).stdout
    found = SERVER_VERSION.search(said)
    address = without_passwords(os.environ.get("OLLAMA_HOST") or DEFAULT_HOST)
    if found is None:
        raise ExportError(
            f"no Ollama server answers: {said.strip()!r}", address, "start it: `ollama serve`, or open its application"
        )
    version = ".".join(found.groups())
    if requires and _numbers(version) < _numbers(requires):
        raise ExportError(
            f"the Ollama server is {version}, the Modelfile needs {requires} or later to prompt as trained",
            address,
            "update Ollama (https://ollama.com/download), and start its server again",
        )


def create(name: str, modelfile: Path) -> None:
    """Make the model in Ollama; its progress goes to the terminal. Raises ExportError where Ollama refuses."""
    done = subprocess.run(commands(name, modelfile)[0], check=False)
    if done.returncode != 0:
        raise ExportError(
            f"`ollama create` ended with status {done.returncode}: its own words stand above",
            modelfile,
            "run `dvc repro ollama_modelfile`, and see that there is room on Ollama's disk",
        )


def ask(name: str, question: str) -> str:
    """The answer of the model `name`; raises ExportError where Ollama refuses, or answers nothing."""
    command = [*commands(name, Path())[1], question]
    done = _run(command)
    if done.returncode != 0 or not done.stdout.strip():
        what = f"status {done.returncode}: {done.stderr.strip()[-500:]}" if done.returncode else "an empty answer"
        raise ExportError(
            f"`ollama run` ended with {what}", shlex.join(command), "see the server's log (`ollama serve` shows it)"
        )
    return done.stdout.strip()


def serve(modelfile: Path, question: str) -> None:
    """Show the commands, and run them where Ollama is; raises FinetuneError for what is missing or refused."""
    requires = read_modelfile(modelfile)[0].requires
    name = load_params(PARAMS_FILE).registration.model_name
    for command in commands(name, modelfile):
        sys.stdout.write(shlex.join(command) + "\n")
    sys.stdout.flush()
    if shutil.which(PROGRAM) is None:
        newer = f" {requires} or later" if requires else ""
        logger.info("Ollama is not installed here: get it%s from https://ollama.com/download, then type these", newer)
        return
    check_server(requires)
    create(name, modelfile)
    logger.info("asking %s: %s", name, question)
    sys.stdout.write(printable(ask(name, question)) + "\n")


def main() -> None:
    """Read the arguments and serve."""
    setup_logging("ollama")
    parser = argparse.ArgumentParser(prog="python -m finetune.ollama", description="give a model to Ollama")
    parser.add_argument("modelfile", type=Path, help="such as models/ollama/Modelfile")
    parser.add_argument("--ask", metavar="QUESTION", default=QUESTION, help="what to ask it then")
    arguments = parser.parse_args()
    try:
        serve(arguments.modelfile, arguments.ask)
    except FinetuneError as error:
        logger.error("%s: %s", type(error).__name__, error)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split("."))


if __name__ == "__main__":
    main()
