from __future__ import annotations

import pytest

from finetune.evaluation.generation import Answer
from finetune.evaluation.group_scores import GroupScores
from finetune.evaluation.perplexity import Score
from finetune.evaluation.report import (
    perplexity_rows,
    ratio_rows,
    sample_rows,
    side_by_side,
    summary_line,
    task_figures,
)
from finetune.evaluation.tasks import Prompt

SCORES: GroupScores = {
    ("a", "a/1"): {"base": Score(4.0, 2, 0, 8), "tuned": Score(2.0, 2, 1, 8)},
    ("b", "b/1"): {"base": Score(2.0, 1, 1, 4), "tuned": Score(1.0, 1, 1, 4)},
    ("b", "b/2"): {"base": Score(2.0, 1, 1, 4), "tuned": Score(1.5, 1, 1, 4)},
}


def prompt(task: str, expected: object = None, reference: str = "") -> Prompt:
    return {
        "task": task,
        "id": "1",
        "source": "a",
        "prompt_ids": [1, 2],
        "max_new_tokens": 4,
        "stop_ids": [2],
        "expected": expected,
        "reference": reference,
    }


def test_base_and_tuned_stand_side_by_side_by_source_and_over_all_tokens() -> None:
    numbers = side_by_side(SCORES, 200, 42)
    assert numbers["base"]["perplexity"] == pytest.approx(7.38905609893065, rel=1e-12)
    assert numbers["perplexity_ratio"] == pytest.approx(0.41686201967850844, rel=1e-12)
    assert numbers["tuned"]["token_accuracy"] == 0.75
    assert numbers["tuned"]["bytes"] == 16
    assert numbers["by_source"]["b"]["perplexity_ratio"] == pytest.approx(0.4723665527410147, rel=1e-12)
    assert [(source, model, round(value, 3)) for source, model, value in perplexity_rows(numbers)] == [
        ("a", "base", 7.389),
        ("a", "tuned", 2.718),
        ("b", "base", 7.389),
        ("b", "tuned", 3.49),
    ]


def test_one_group_has_no_interval_and_many_have_one_around_the_ratio() -> None:
    numbers = side_by_side(SCORES, 200, 42)
    interval = numbers["perplexity_ratio_interval"]
    assert interval["low"] < numbers["perplexity_ratio"] < interval["high"]
    assert "perplexity_ratio_interval" not in numbers["by_source"]["a"]
    assert numbers["by_source"]["b"]["perplexity_ratio_interval"] == {
        "low": pytest.approx(0.36787944117144233, rel=1e-12),
        "high": pytest.approx(0.6065306597126334, rel=1e-12),
    }
    rows = ratio_rows(numbers)
    assert [row[0] for row in rows] == ["a", "b", "all sources"]
    assert rows[0][2:] == ("", "")
    assert rows[2][2:] == (interval["low"], interval["high"])


def test_a_style_has_the_held_out_answers_beside_base_and_tuned() -> None:
    prompts = [prompt("samples"), prompt("style.a", {"opening": "Le", "other": "le train"}, " train")]
    answers = {name: [Answer((), "x"), Answer((), text)] for name, text in (("base", ""), ("tuned", " bus"))}
    figures = task_figures(prompts, answers)
    assert list(figures) == ["style.a"]
    assert list(figures["style.a"]) == ["base", "tuned", "held_out"]
    assert figures["style.a"]["held_out"]["vocabulary_distance"] == 0.0
    assert figures["style.a"]["tuned"]["mean_characters"] == 6


def test_samples_show_the_prompt_and_all_answers_and_leave_out_scored_questions() -> None:
    prompts = [prompt("labels.a", {"labels": ["x"]}, "x"), prompt("samples", reference="ref")]
    answers = {name: [Answer((), "x"), Answer((), f"{name} answer")] for name in ("base", "tuned")}
    assert sample_rows(prompts, answers, lambda ids: f"ids {ids}") == [
        {"source": "a", "prompt": "ids [1, 2]", "reference": "ref", "base": "base answer", "tuned": "tuned answer"}
    ]


def test_the_last_line_says_how_sure_the_ratio_is() -> None:
    both = {"base": {"correct": 0.25}, "tuned": {"correct": 0.5}}
    numbers = {**side_by_side(SCORES, 200, 42), "tasks": {"tool_calls.x": both, "memorization": {"tuned": {}}}}
    interval = {"low": 0.3, "high": 0.5}
    assert summary_line({**numbers, "perplexity_ratio_interval": interval}) == (
        "test perplexity 7.39 base, 3.08 tuned (ratio 0.417, 95 % 0.300 to 0.500) on 4 tokens; "
        "tool_calls.x correct 25% -> 50%"
    )
