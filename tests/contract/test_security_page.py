"""docs/security.md stands on tests that exist, and docs/faq.md on threads and tests; no security test is left out."""

from __future__ import annotations

import re

import pytest
from pipeline_files import ROOT
from stage_tables import between
from test_docs import has_test
from test_faults_page import functions_in, is_test, named

SECURITY, QUESTIONS = ROOT / "docs/security.md", ROOT / "docs/faq.md"
THREAD = re.compile(r"\]\(https://github\.com/[\w.-]+/[\w.-]+/(issues|pull)/\d+\)")
LEAST_QUESTIONS = 15


def faults_of(rows: list[list[str]]) -> list[str]:
    """What is wrong with a table of threats: a row is a threat, an answer, and tests alone, which exist."""
    wrong = []
    for threat, answer, cell in rows:
        wrong += [f"{threat}: no test {name}" for name in named(cell) if not is_test(name)]
        wrong += [f"{threat}: what is done?"] if len(answer) < 20 else []
        if not named(cell) or ", ".join(f"`{name}`" for name in named(cell)) != cell:
            wrong.append(f"{threat}: tests, and nothing but tests")
    return wrong


def test_every_threat_stands_on_tests_that_exist() -> None:
    rows = between(SECURITY.read_text(encoding="utf-8"), "threats")
    assert len(rows) >= 18
    assert faults_of(rows) == []


def test_every_security_test_has_its_row() -> None:
    rows = between(SECURITY.read_text(encoding="utf-8"), "threats")
    shown = {name for _, _, cell in rows for name in named(cell)}
    files = sorted((ROOT / "tests/security").glob("test_*.py"))
    written = {f"{file.relative_to(ROOT).as_posix()}::{name}" for file in files for name in functions_in(file)}
    assert len(written) >= 25
    assert sorted(written - shown) == []


@pytest.mark.parametrize(
    "row",
    [
        ["fire", "it is put out by water", "`tests/contract/test_docs.py::test_nothing`"],
        ["fire", "it is put out by water", ""],
        ["fire", "", "`tests/contract/test_security_page.py::test_every_security_test_has_its_row`"],
        ["fire", "it is put out by water", "`tests/contract/test_faults_page.py::test_every_fault_has_its_row`, luck"],
    ],
)
def test_a_threat_without_a_test_is_found(row: list[str]) -> None:
    assert len(faults_of([row])) >= 1


def test_every_question_was_asked_somewhere_and_is_answered_by_a_test() -> None:
    sections = re.split(r"^## ", QUESTIONS.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    assert len(sections) >= LEAST_QUESTIONS
    titles = [section.splitlines()[0] for section in sections]
    assert [title for title in titles if not title.endswith("?")] == []
    assert [title for title, text in zip(titles, sections, strict=True) if not THREAD.search(text)] == []
    answered = [[name for name in re.findall(r"`(test_\w+)`", text) if has_test(name)] for text in sections]
    assert [title for title, tests in zip(titles, answered, strict=True) if not tests] == []
