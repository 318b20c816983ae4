"""prompts of data/evaluation/prompts.jsonl + a model's answers -> figures by task, the same for every model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from finetune.evaluation.labels import score_labels
from finetune.evaluation.style import score_style
from finetune.evaluation.tool_calls import score_tool_calls

SAMPLES = "samples"
SCORERS = {"tool_calls": score_tool_calls, "style": score_style, "labels": score_labels}


class Prompt(TypedDict):
    """A question to a model, a row of prompts.jsonl.

    `task`: `tool_calls.<set>`, `style.<source>`, `labels.<source>`, or `samples`, which is looked at and not scored.
    `stop_ids`: tokens that end an answer. `expected`: what its scorer compares with. `reference`: the held-out answer
    as text.
    """

    task: str
    id: str
    source: str
    prompt_ids: list[int]
    max_new_tokens: int
    stop_ids: list[int]
    expected: Any
    reference: str


def score_tasks(prompts: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Figures of each scored task, tasks in alphabetical order; one answer for each prompt, in the same order.

    Answers are texts in which special tokens are spelled out, without the token that ended them.
    """
    by_task: dict[str, list[tuple[Mapping[str, Any], str]]] = {}
    for prompt, text in zip(prompts, answers, strict=True):
        if prompt["task"] != SAMPLES:
            by_task.setdefault(prompt["task"], []).append((prompt, text))
    return {task: SCORERS[task.partition(".")[0]](pairs) for task, pairs in sorted(by_task.items())}
