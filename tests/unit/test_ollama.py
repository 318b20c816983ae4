"""The commands given to Ollama, with a stand-in in its place.

Ollama itself cannot be installed where these tests run: the stand-in writes what version 0.33 writes (cmd/cmd.go), and
records how it was called. What Ollama makes of a Modelfile is not shown here, but by the tests of the TEMPLATE.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_RUNNING = "Warning: could not connect to a running Ollama instance\nWarning: client version is 0.33.1"
STAND_IN = """#!{python}
import json, pathlib, sys
here = pathlib.Path(__file__).parent
answer = json.loads((here / "answers.json").read_text())[sys.argv[1]]
with (here / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
sys.stdout.write(answer.get("out", ""))
sys.stderr.write(answer.get("err", ""))
sys.exit(answer.get("status", 0))
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with params.yaml, a Modelfile and its GGUF."""
    folder = tmp_path / "a clone"
    (folder / "models/ollama").mkdir(parents=True)
    (folder / "models/gguf").mkdir()
    (folder / "models/gguf/model-Q8_0.gguf").touch()
    shutil.copy(ROOT / "recipes/smoke/params.yaml", folder)
    write_modelfile(folder, "")
    return folder


def write_modelfile(clone: Path, last: str) -> None:
    numbers = "".join(f"PARAMETER {name} 1\n" for name in ("num_ctx", "temperature", "top_p", "repeat_penalty"))
    text = f'FROM ../gguf/model-Q8_0.gguf\nTEMPLATE """x"""\n{numbers}{last}'
    (clone / "models/ollama/Modelfile").write_text(text)


def install(folder: Path, **answers: dict[str, object]) -> None:
    folder.mkdir()
    said = {
        "--version": {"out": "ollama version is 0.33.1\n"},
        "create": {"err": "success\n"},
        "run": {"out": "Oui.\n"},
    }
    (folder / "answers.json").write_text(json.dumps({**said, **answers}))
    (folder / "ollama").write_text(STAND_IN.format(python=sys.executable))
    (folder / "ollama").chmod(0o755)


def calls(folder: Path) -> list[list[str]]:
    return [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]


def run(clone: Path, programs: Path, *arguments: str, host: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "finetune.ollama", "models/ollama/Modelfile", *arguments]
    environment = {**os.environ, "PATH": str(programs), "OLLAMA_HOST": host}
    return subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=False)


CREATE = ["create", "finetune-smoke", "-f", "models/ollama/Modelfile"]


def test_the_model_is_made_and_asked(clone: Path, tmp_path: Path) -> None:
    install(tmp_path / "bin")
    done = run(clone, tmp_path / "bin", "--ask", "Ouvert lundi ?")
    assert done.returncode == 0, done.stderr
    assert calls(tmp_path / "bin") == [["--version"], CREATE, ["run", "finetune-smoke", "Ouvert lundi ?"]]
    assert done.stdout == ("ollama create finetune-smoke -f models/ollama/Modelfile\nollama run finetune-smoke\nOui.\n")


def test_an_answer_does_not_command_the_terminal_and_a_password_is_not_shown(clone: Path, tmp_path: Path) -> None:
    install(tmp_path / "bin", run={"out": "\x1b[2JOui.\n"})
    assert run(clone, tmp_path / "bin").stdout.endswith("\n\\x1b[2JOui.\n")
    install(tmp_path / "away", **{"--version": {"out": NOT_RUNNING}})
    refused = run(clone, tmp_path / "away", host="http://ann:hunter2@127.0.0.1:9")
    assert "where:  http://***@127.0.0.1:9" in refused.stderr
    assert "hunter2" not in refused.stderr


def test_without_ollama_the_commands_are_the_answer(clone: Path, tmp_path: Path) -> None:
    write_modelfile(clone, "REQUIRES 0.30.0\n")
    done = run(clone, tmp_path)
    assert done.returncode == 0
    assert done.stdout == "ollama create finetune-smoke -f models/ollama/Modelfile\nollama run finetune-smoke\n"
    assert "not installed here: get it 0.30.0 or later from https://ollama.com/download" in done.stderr


@pytest.mark.parametrize(
    ("answers", "called", "messages"),
    [
        (
            {"--version": {"out": NOT_RUNNING}},
            [["--version"]],
            ["no Ollama server answers", "where:  127.0.0.1:11434", "start it: `ollama serve`"],
        ),
        (
            {"--version": {"out": "ollama version is 0.29.9\nWarning: client version is 0.33.1\n"}},
            [["--version"]],
            ["the Ollama server is 0.29.9, the Modelfile needs 0.30.0 or later", "update Ollama"],
        ),
        (
            {"create": {"err": "Error: invalid model name\n", "status": 1}},
            [["--version"], CREATE],
            ["Error: invalid model name", "`ollama create` ended with status 1", "where:  models/ollama/Modelfile"],
        ),
        (
            {"run": {"err": "Error: llama runner process has terminated\n", "status": 1}},
            [["--version"], CREATE, ["run", "finetune-smoke", "Bonjour !"]],
            ["status 1: Error: llama runner process has terminated", "`ollama serve` shows it"],
        ),
        (
            {"run": {"out": " \n"}},
            [["--version"], CREATE, ["run", "finetune-smoke", "Bonjour !"]],
            ["`ollama run` ended with an empty answer", "ollama run finetune-smoke 'Bonjour !'"],
        ),
    ],
)
def test_what_ollama_refuses_is_an_error_with_its_remedy(
    clone: Path, tmp_path: Path, answers: dict[str, dict[str, object]], called: list[list[str]], messages: list[str]
) -> None:
    write_modelfile(clone, "REQUIRES 0.30.0\n")
    install(tmp_path / "bin", **answers)
    done = run(clone, tmp_path / "bin")
    assert done.returncode == 1
    assert calls(tmp_path / "bin") == called
    for message in messages:
        assert message in done.stderr


@pytest.mark.parametrize("version", ["0.30.0", "v0.30.0-rc1", "1.0.0"])
def test_the_version_asked_for_and_later_ones_will_do(clone: Path, tmp_path: Path, version: str) -> None:
    write_modelfile(clone, "REQUIRES 0.30.0\n")
    install(tmp_path / "bin", **{"--version": {"out": f"ollama version is {version}\n"}})
    assert run(clone, tmp_path / "bin").returncode == 0


def test_a_missing_gguf_is_told_before_ollama_pulls_another_model(clone: Path, tmp_path: Path) -> None:
    (clone / "models/gguf/model-Q8_0.gguf").unlink()
    install(tmp_path / "bin")
    done = run(clone, tmp_path / "bin")
    assert done.returncode == 1
    assert "the GGUF that FROM names is missing" in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "bin/calls.jsonl").exists()
