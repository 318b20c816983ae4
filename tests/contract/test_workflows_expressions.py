"""scripts/workflow_expressions.py evaluates as GitHub documents it, and refuses what it does not know."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from workflow_expressions import ExpressionError, condition, evaluate, filled  # noqa: E402

CONTEXTS: dict[str, Any] = {
    "github": {"ref": "refs/heads/main", "event_name": "push"},
    "matrix": {"python": "3.12", "fast": True},
    "steps": {"upload": {"outputs": {"artifact-url": "file:///x"}}},
    "status": {"always": True, "success": True, "failure": False, "cancelled": False},
}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("github.ref", "refs/heads/main"),
        ("'it''s'", "it's"),
        ("github.ref != 'refs/heads/main'", False),
        # Texts are compared without regard to case.
        ("github.event_name == 'PUSH'", True),
        ("!matrix.fast", False),
        # The operators give one of their sides, not true or false.
        ("matrix.fast && 'yes' || 'no'", "yes"),
        ("'' || 'other'", "other"),
        ("(false || true) && 2", 2.0),
        ("null", None),
        ("steps.upload.outputs.artifact-url", "file:///x"),
        ("contains('Hello', 'ELL')", True),
        ("startsWith(github.ref, 'refs/tags/')", False),
        ("format('origin/{0}', github.event_name)", "origin/push"),
        ("true == true && 1 == 1", True),
        ("always() && !failure()", True),
    ],
)
def test_expressions(tmp_path: Path, text: str, value: object) -> None:
    assert evaluate(text, CONTEXTS, tmp_path) == value


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("github.reff", "github.reff is not known here"),
        ("secrets.TOKEN", "secrets.TOKEN is not known here"),
        ("steps.upload", "steps.upload is no single value"),
        ("toJSON(matrix.python)", "function toJSON is not known here"),
        ("github.ref ==", "ends too early"),
        ("github.ref 'x'", "\"'x'\" is not expected here"),
        ("github.ref =! 'x'", "cannot read"),
        ("(github.ref", "')' is missing"),
        ("&& true", "'&&' is not expected here"),
    ],
)
def test_what_is_not_known_is_an_error(tmp_path: Path, text: str, seen: str) -> None:
    with pytest.raises(ExpressionError) as caught:
        evaluate(text, CONTEXTS, tmp_path)
    assert seen in str(caught.value)


def test_a_text_is_filled(tmp_path: Path) -> None:
    text = "${{ github.event_name }}-${{matrix.fast}}-${{ null }}-${{ 1.50 }}"
    assert filled(text, CONTEXTS, tmp_path) == "push-true--1.5"
    assert filled("nothing", CONTEXTS, tmp_path) == "nothing"


@pytest.mark.parametrize(
    ("text", "failed", "holds"),
    [
        ("success()", True, False),
        ("always()", True, True),
        ("${{ failure() }}", True, True),
        # A condition that names no status asks for success as well.
        ("github.event_name == 'push'", False, True),
        ("github.event_name == 'push'", True, False),
        ("always() && github.event_name == 'push'", True, True),
    ],
)
def test_a_condition_asks_for_success_unless_it_names_a_status(
    tmp_path: Path, text: str, failed: bool, holds: bool
) -> None:
    contexts = {**CONTEXTS, "status": {"always": True, "success": not failed, "failure": failed, "cancelled": False}}
    assert condition(text, contexts, tmp_path) is holds


def test_hash_files_follows_the_content_and_is_empty_without_a_file(tmp_path: Path) -> None:
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements/lock.txt").write_text("a==1\n")
    (tmp_path / "requirements/notes.md").write_text("not this\n")
    first = evaluate("hashFiles('requirements/*.txt')", {}, tmp_path)
    assert first == hashlib.sha256(hashlib.sha256(b"a==1\n").digest()).hexdigest()
    (tmp_path / "requirements/lock.txt").write_text("a==2\n")
    assert evaluate("hashFiles('requirements/*.txt')", {}, tmp_path) != first
    assert evaluate("hashFiles('*.toml')", {}, tmp_path) == ""
