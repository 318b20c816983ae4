"""scores and answers -> the rows of the metrics file, the plots and the samples file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from finetune.evaluation.generation import Answer
from finetune.evaluation.group_scores import GroupScores
from finetune.evaluation.intervals import ratio_interval
from finetune.evaluation.perplexity import Score
from finetune.evaluation.tasks import SAMPLES, Prompt, score_tasks

PERPLEXITY_COLUMNS = ("source", "model", "perplexity")
RATIO_COLUMNS = ("source", "ratio", "low", "high")


def side_by_side(scores: GroupScores, resamples: int, seed: int) -> dict[str, Any]:
    """Base beside tuned, over all rows and by source; `perplexity_ratio` is tuned over base, with its 95 % interval.

    One group has no interval: nothing else could have been drawn.
    """
    by_source: dict[str, GroupScores] = {}
    for key, both in scores.items():
        by_source.setdefault(key[0], {})[key] = both
    return {
        **_compared(scores, resamples, seed),
        "by_source": {source: _compared(groups, resamples, seed) for source, groups in by_source.items()},
    }


def _compared(groups: GroupScores, resamples: int, seed: int) -> dict[str, Any]:
    base, tuned = (sum((both[name] for both in groups.values()), Score()).summary() for name in ("base", "tuned"))
    figures = {"base": base, "tuned": tuned, "perplexity_ratio": tuned["perplexity"] / base["perplexity"]}
    if len(groups) > 1:
        differences = [both["tuned"].nats - both["base"].nats for both in groups.values()]
        tokens = [both["tuned"].tokens for both in groups.values()]
        figures["perplexity_ratio_interval"] = ratio_interval(differences, tokens, resamples, seed)
    return figures


def task_figures(prompts: Sequence[Prompt], answers: Mapping[str, Sequence[Answer]]) -> dict[str, Any]:
    """{task: {model: figures}}; a style has those of the held-out answers beside them, as `held_out`."""
    figures: dict[str, dict[str, Any]] = {}
    scored = {name: score_tasks(prompts, [answer.text for answer in given]) for name, given in answers.items()}
    styled = [prompt for prompt in prompts if prompt["task"].startswith("style.")]
    scored["held_out"] = score_tasks(styled, [prompt["reference"] for prompt in styled])
    for name, tasks in scored.items():
        for task, numbers in tasks.items():
            figures.setdefault(task, {})[name] = numbers
    return figures


def perplexity_rows(numbers: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """PERPLEXITY_COLUMNS of every source, for a plot."""
    return [
        (source, model, both[model]["perplexity"])
        for source, both in numbers["by_source"].items()
        for model in ("base", "tuned")
    ]


def ratio_rows(numbers: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """RATIO_COLUMNS of every source and of all together, for a plot; an interval that does not exist is empty."""
    rows = [*numbers["by_source"].items(), ("all sources", numbers)]
    empty = {"low": "", "high": ""}
    return [
        (source, each["perplexity_ratio"], *each.get("perplexity_ratio_interval", empty).values())
        for source, each in rows
    ]


def sample_rows(
    prompts: Sequence[Prompt], answers: Mapping[str, Sequence[Answer]], decode: Callable[[list[int]], str]
) -> list[dict[str, str]]:
    """Each sample's prompt and own answer with the answers of the models."""
    return [
        {
            "source": prompt["source"],
            "prompt": decode(prompt["prompt_ids"]),
            "reference": prompt["reference"],
            **{name: given[at].text for name, given in answers.items()},
        }
        for at, prompt in enumerate(prompts)
        if prompt["task"] == SAMPLES
    ]


def summary_line(numbers: Mapping[str, Any]) -> str:
    """What the stage ends with: both perplexities, their ratio and its interval, and what the tasks came to."""
    interval = numbers.get("perplexity_ratio_interval")
    sure = f", 95 % {interval['low']:.3f} to {interval['high']:.3f}" if interval else ""
    calls = [
        f"; {task} {key} {models['base'][key]:.0%} -> {models['tuned'][key]:.0%}"
        for task, models in numbers["tasks"].items()
        for key in ("correct", "restraint")
        if key in models["tuned"]
    ]
    return (
        f"test perplexity {numbers['base']['perplexity']:.2f} base, {numbers['tuned']['perplexity']:.2f} tuned "
        f"(ratio {numbers['perplexity_ratio']:.3f}{sure}) on {numbers['tuned']['tokens']} tokens{''.join(calls)}"
    )
