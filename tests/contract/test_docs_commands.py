"""Every command that a page shows is run: by a test that is named, here in a clone, or where what it needs is said."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
from documented_commands import HERE, MARKED, PAGES, PROOFS, SHELL, Block, blocks, lacking, names
from pipeline_files import ROOT, stages

sys.path.insert(0, str(ROOT / "tests/pipeline"))
from clone import clone, run

# Of the stages, the first two are run; the others are called the same way, and need what these make.
SINGLE = "dvc repro --single-item "
FIRST = ("fetch", "clean")


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_run_or_says_what_it_needs(page: str) -> None:
    found = [
        (command, fault)
        for block in blocks((ROOT / page).read_text(encoding="utf-8"))
        for command in block.commands
        if (fault := lacking(command, block.above))
    ]
    assert found == []


def shown_commands() -> list[str]:
    """The commands of all pages that this file runs, each once."""
    shown = [
        command
        for page in PAGES
        for block in blocks((ROOT / page).read_text(encoding="utf-8"))
        for command in block.commands
        if not MARKED.search(block.above) and not command.startswith(SHELL)
    ]
    begins = tuple(begin for begin, test in PROOFS.items() if test == HERE)
    return sorted({command for command in shown if command.startswith(begins)})


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone in which nothing was run, but that has what MLflow keeps."""
    folder = clone(tmp_path_factory.mktemp("commands") / "clone")
    (folder / "mlartifacts").mkdir()
    (folder / "mlflow.db").touch()
    return folder


def test_commands_run_as_they_are_shown(copy: Path) -> None:
    commands = shown_commands()
    single = [command.removeprefix(SINGLE) for command in commands if command.startswith(SINGLE)]
    assert sorted(single) == sorted(stages())
    others = [command for command in commands if not command.startswith(SINGLE)]
    assert {"dvc stage list", "cp -r recipes/smoke recipes/mine"} <= set(others)
    for command in [*(f"{SINGLE}{stage}" for stage in FIRST), *others]:
        done = run(shlex.split(command), copy)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    assert (copy / "metrics/clean.json").is_file()
    assert (copy / "recipes/mine/params.yaml").is_file()
    assert "shared = group" in (copy / ".dvc/config.local").read_text(encoding="utf-8")


@pytest.mark.parametrize(("begin", "test"), PROOFS.items())
def test_a_proof_of_the_register_exists_and_names_what_it_runs(begin: str, test: str) -> None:
    assert names(test, begin)
    target = f"\n{begin.removeprefix('make ')}:"
    assert not begin.startswith("make ") or target in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("```sh\nmake nothing\n```\n", "no test runs it"),
        ("Then:\n\n```sh\ncurl http://127.0.0.1\n```\n", "no test runs it"),
        ("It is `test_nothing_of_the_kind`:\n\n```sh\ncurl x\n```\n", "no test runs it"),
        ("It is `test_plots_are_drawn`:\n\n```sh\nsbatch x\n```\n", "no test runs it"),
        ("Long ago it needed Docker.\n\n```sh\ndocker run x\n```\n", "no test runs it"),
    ],
)
def test_a_command_that_nobody_runs_is_found(text: str, fault: str) -> None:
    (block,) = blocks(text)
    assert fault in str(lacking(block.commands[0], block.above))


def test_a_block_is_its_commands_and_the_paragraph_above_it() -> None:
    shown = "  A=1 docker run \\\n    x  # why\n  # only words\n  make image\n"
    text = f"One.\n\nThis needs Docker:\n\n  ```sh\n{shown}  ```\n"
    assert list(blocks(text)) == [Block("This needs Docker:", ("A=1 docker run      x", "make image"))]
    assert lacking("A=1 docker run x", "This needs Docker:") is None
    assert lacking("make chat", "") is None


def test_a_command_that_fails_here_would_be_seen(copy: Path) -> None:
    assert run(shlex.split(f"{SINGLE}no_such_stage"), copy).returncode != 0
