from __future__ import annotations

import pytest

from finetune.evaluation.tasks import score_tasks

PROMPTS = [
    {"task": "tool_calls.b", "expected": None, "reference": ""},
    {"task": "samples", "expected": None, "reference": "x"},
    {"task": "labels.a", "expected": {"labels": ["oui", "non"]}, "reference": "oui"},
    {"task": "tool_calls.b", "expected": None, "reference": ""},
]


def test_each_task_is_scored_by_its_kind_and_samples_are_not() -> None:
    figures = score_tasks(PROMPTS, ["Non.", "anything", "Oui", "f()"])
    assert list(figures) == ["labels.a", "tool_calls.b"]
    assert figures["labels.a"]["accuracy"] == 1.0
    assert figures["tool_calls.b"]["restraint"] == 0.5


def test_an_answer_that_is_missing_is_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        score_tasks(PROMPTS, ["Non.", "anything", "Oui"])
