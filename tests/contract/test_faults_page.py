"""docs/faults.md names, for every fault that this project answers for, the tests that bring it about."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from pipeline_files import ROOT

PAGE = ROOT / "docs/faults.md"
# A test of these files that no row names is a promise that nobody can read.
FAULT_TESTS = (
    "tests/pipeline/test_faults.py",
    "tests/unit/test_full_disk.py",
    "tests/unit/training/test_checkpoint_faults.py",
    "tests/unit/training/test_damaged_inputs.py",
    "tests/unit/training/test_training_faults.py",
    "tests/unit/training/test_training_full_disk.py",
)
# What every row of the page begins with, in its order.
FAULTS = (
    "`kill -9` while a checkpoint is written",
    "`kill -9` at any step",
    "power failure",
    "`kill -9` at the end of training",
    "a damaged checkpoint",
    "Ctrl-C, SIGTERM, pre-emption",
    "a log entry over several steps, and a stop between them",
    "a changed parameter, input, seed or library",
    "`kill -9` in another stage",
    "`kill -9` while DVC writes `dvc.lock` or its rwlock",
    "a second `make repro` beside the first",
    "disk full in a checkpoint",
    "disk full in any other file",
    "weights of a Hub base damaged in its cache",
    "weights or rows cut short",
    "an out changed between two stages",
    "a bit of an out flipped by the disk itself",
    "network dies in fetch",
    "out of memory in a step",
    "NaN or infinity in a step",
    "NaN in more steps in a row than `max_skipped_steps`",
    "clock jumps, another time zone, locale C",
    "MLflow down at the start, in the middle, or slow",
    "the GPU vanishes, or its driver fails",
)
NOT_RUN = re.compile(r"not run here: \S.*")


def rows(page: str) -> list[tuple[str, str, str]]:
    """Fault, what happens, and tests, of each row between the two comments."""
    table = page.split("<!-- faults -->\n")[1].split("<!-- /faults -->")[0]
    return [(first, second, third) for first, second, third in (_cells(line) for line in table.splitlines()[2:])]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def named(cell: str) -> list[str]:
    """The tests that a cell names as `path::name`."""
    return re.findall(r"`(tests/[\w./]+\.py::\w+)`", cell)


def functions_in(file: Path) -> dict[str, bool]:
    """Name -> whether it is never run, of the test functions of a file."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    marks = {node.name: [ast.unparse(mark) for mark in node.decorator_list] for node in functions}
    return {
        name: any(mark.startswith(("pytest.mark.skip(", "pytest.mark.xfail")) for mark in each)
        for name, each in marks.items()
    }


def is_test(name: str) -> bool:
    """Whether `path::name` is a test that is run, where its needs are met."""
    path, _, function = name.partition("::")
    return (ROOT / path).is_file() and functions_in(ROOT / path).get(function) is False


def faults_of(page: str) -> list[str]:
    """What is wrong with the table; a row stands on tests that exist, or says why it has none."""
    wrong = []
    for fault, happens, cell in rows(page):
        wrong += [f"{fault}: no test {name}" for name in named(cell) if not is_test(name)]
        wrong += [f"{fault}: what happens?"] if not happens else []
        if not named(cell) and not NOT_RUN.fullmatch(cell):
            wrong.append(f"{fault}: neither a test nor a reason")
        if named(cell) and ", ".join(f"`{name}`" for name in named(cell)) != cell:
            wrong.append(f"{fault}: more than tests: {cell}")
    return wrong


def test_every_row_stands_on_tests_that_exist() -> None:
    assert faults_of(PAGE.read_text(encoding="utf-8")) == []


def test_every_fault_has_its_row() -> None:
    assert tuple(fault for fault, _, _ in rows(PAGE.read_text(encoding="utf-8"))) == FAULTS


def test_every_test_of_a_fault_has_its_row() -> None:
    shown = {name for _, _, cell in rows(PAGE.read_text(encoding="utf-8")) for name in named(cell)}
    written = {f"{file}::{name}" for file in FAULT_TESTS for name in functions_in(ROOT / file)}
    assert sorted(written - shown) == []


def test_the_counts_of_deaths_are_those_of_the_test() -> None:
    text = (ROOT / "tests/unit/training/fault_runs.py").read_text(encoding="utf-8")
    (counts,) = re.findall(r"^DEATHS_IN_EPOCH_1, DEATHS_IN_EPOCH_2, POWER_FAILURES = (\d+), (\d+), (\d+)$", text, re.M)
    shown = {
        fault: tuple(re.findall(r"at (?:each of )?(\d+)", happens))
        for fault, happens, _ in rows(PAGE.read_text("utf-8"))
    }
    assert shown[FAULTS[0]] + shown["power failure"] == counts


@pytest.mark.parametrize(
    ("cell", "wrong"),
    [
        ("", "neither a test nor a reason"),
        ("surely", "neither a test nor a reason"),
        ("not run here: ", "neither a test nor a reason"),
        (
            "`tests/contract/test_faults_page.py::test_nothing`",
            "no test tests/contract/test_faults_page.py::test_nothing",
        ),
        ("`tests/none.py::test_every_fault_has_its_row`", "no test tests/none.py"),
        ("`tests/contract/test_faults_page.py::rows`", "no test tests/contract/test_faults_page.py::rows"),
        ("`tests/contract/test_faults_page.py::test_every_fault_has_its_row` and luck", "more than tests"),
    ],
)
def test_a_row_without_a_test_is_found(cell: str, wrong: str) -> None:
    page = f"<!-- faults -->\n| a | b | c |\n|---|---|---|\n| fire | it burns | {cell} |\n<!-- /faults -->\n"
    (found,) = faults_of(page)
    assert wrong in found
