"""merged model beside its GGUF files -> what each type costs: figures, the Pareto front, budgets, a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from finetune.errors import DataError, ExportError
from finetune.evaluation.divergence import compare_row
from finetune.evaluation.generation import decode, without_end
from finetune.evaluation.perplexity import (
    Comparison,
    LogitsOf,
    Score,
    score,
    special_ids,
    trained_text_bytes,
)
from finetune.evaluation.tasks import SAMPLES, score_tasks
from finetune.log import progress
from finetune.sections import QuantizeGguf

ContinueIds = Callable[[list[int], int, Collection[int]], list[int]]
# What a GGUF can be asked for (export/gguf.py): logits of ids, and a greedy continuation (ids, most new tokens, ends).
Served = tuple[LogitsOf, ContinueIds]
# llama.cpp is compiled on each machine, by its compiler and against its libm: the digits behind these differ.
LLAMA_DECIMALS = {"perplexity": 4, "perplexity_ratio": 5, "mean_kl": 6, "bits_per_byte": 5}
PLOT_COLUMNS = ("type", "size_bytes", "perplexity_ratio", "mean_kl", "top1_agreement", "pareto")
MIB = 1 << 20
HEADINGS = ("type", "MiB", "ppl ratio", "KL", "same top-1", "prompt tok/s", "new tok/s", "peak MiB", "")


@dataclass(frozen=True)
class Measured:
    """The merged model's score, each type's figures, and each type's answers to the prompts, in their order."""

    merged: Score
    types: dict[str, dict[str, float]]
    answers: dict[str, list[str]]


def measure_types(
    reference: LogitsOf,
    groups: Iterable[AbstractContextManager[Mapping[str, Served]]],
    rows: Callable[[], Iterable[Mapping[str, Any]]],
    prompts: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
) -> Measured:
    """Measure every type of every group beside the reference; one group of files is open at a time.

    The rows are read once for each group, and once to count them.
    """
    total = sum(1 for _ in rows())
    merged = Score()
    types: dict[str, dict[str, float]] = {}
    answers: dict[str, list[str]] = {}
    for group in groups:
        with group as models:
            others = {name: logits_of for name, (logits_of, _) in models.items()}
            words = tokenizer.backend_tokenizer
            merged, figures = measure_beside(reference, others, rows(), total, words, "merged and GGUF")
            _check_finite(figures)
            types |= {name: quantised_figures(each, merged.summary()["perplexity"]) for name, each in figures.items()}
            answers |= {name: greedy_answers(each, prompts, tokenizer, name) for name, (_, each) in models.items()}
    return Measured(merged, types, answers)


def _check_finite(figures: Mapping[str, Mapping[str, float]]) -> None:
    for name, each in figures.items():
        if not all(map(math.isfinite, each.values())):
            raise ExportError(
                f"{name} gives undefined logits: {each}",
                "quantize_gguf.types",
                f"ask for BF16 in place of {name}: float16 holds no value above 65,504",
            )


def metrics(
    measured: Measured, prompts: Sequence[Mapping[str, Any]], files: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """metrics/quantize_gguf.json: the merged model's figures, and each type's with those of its file and its tasks."""
    whole = measured.merged.summary()
    types = {
        name: {**measured.types[name], **figures, "tasks": score_tasks(prompts, measured.answers[name])}
        for name, figures in files.items()
    }
    return {"merged_perplexity": whole["perplexity"], "merged": whole, "types": types}


def context_tokens(rows: Iterable[Mapping[str, Any]], prompts: Iterable[Mapping[str, Any]], positions: int) -> int:
    """How many tokens a model must hold: the longest row, or prompt with its answer as far as `positions` go.

    Raises DataError when no row has a trained token.
    """
    longest: int = max((len(row["input_ids"]) for row in rows if any(row["trained"][1:])), default=0)
    if longest == 0:
        raise DataError("no row has a trained token", "data/split/test.parquet", "raise split.test_share")
    answered: list[int] = [min(len(prompt["prompt_ids"]) + prompt["max_new_tokens"], positions) for prompt in prompts]
    return max([longest, *answered])


def greedy_answers(
    continue_ids: ContinueIds, prompts: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, label: str
) -> list[str]:
    """Texts of the greedy answers to {prompt_ids, max_new_tokens, stop_ids}, as evaluation/generation.py has them.

    Special tokens are spelled out, apart from the final stop. Equal prompts are answered once.
    """
    wanted = [(tuple(prompt["prompt_ids"]), prompt["max_new_tokens"], tuple(prompt["stop_ids"])) for prompt in prompts]
    unique = dict.fromkeys(wanted)
    made = {
        (ids, limit, stops): decode(tokenizer, without_end(continue_ids(list(ids), limit, set(stops)), *stops))
        for ids, limit, stops in progress(unique, len(unique), "answer", f"{label} answers")
    }
    return [made[each] for each in wanted]


def measure_beside(
    reference: LogitsOf,
    others: Mapping[str, LogitsOf],
    rows: Iterable[Mapping[str, Any]],
    total: int,
    tokenizer: Tokenizer,
    label: str,
) -> tuple[Score, dict[str, dict[str, float]]]:
    """The reference's score over all rows, and each other model's figures with its divergence from the reference.

    One pass, in which the reference computes each row once; no more than one row's logits of two models are held.
    Rows without a trained token behind their first are passed over. `total` is the number of rows, for the bar.
    """
    whole, special = Score(), special_ids(tokenizer)
    totals, against = dict.fromkeys(others, Score()), dict.fromkeys(others, Comparison())
    for row in progress(rows, total, "row", label):
        ids, trained = row["input_ids"], row["trained"]
        if not any(trained[1:]):
            continue
        size_bytes = trained_text_bytes(tokenizer, special, ids, trained)
        expected = reference(ids).cpu()
        whole += score(expected, ids, trained, size_bytes)
        for name, logits_of in others.items():
            obtained = logits_of(ids)
            totals[name] += score(obtained, ids, trained, size_bytes)
            against[name] += compare_row(expected, obtained, ids, trained)
    return whole, {name: {**totals[name].summary(), **against[name].summary()} for name in others}


def sample_rows(
    prompts: Sequence[Mapping[str, Any]], answers: Mapping[str, Sequence[str]], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """{source, prompt, reference, answers: {type: text}} of the prompts that are there to be looked at."""
    return [
        {
            "source": prompt["source"],
            "prompt": decode(tokenizer, prompt["prompt_ids"]),
            "reference": prompt["reference"],
            "answers": {name: texts[place] for name, texts in answers.items()},
        }
        for place, prompt in enumerate(prompts)
        if prompt["task"] == SAMPLES
    ]


def quantised_figures(measured: Mapping[str, float], merged_perplexity: float) -> dict[str, float]:
    """One type's figures with its perplexity as a ratio to the merged model's, to the decimals that hold everywhere."""
    figures = {**measured, "perplexity_ratio": measured["perplexity"] / merged_perplexity}
    return {
        key: round(value, LLAMA_DECIMALS[key]) if key in LLAMA_DECIMALS else value for key, value in figures.items()
    }


def pareto_front(types: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """The types that no other one beats: none is no larger and no farther from the merged model, and in one less."""

    def cost(name: str) -> tuple[float, float]:
        return types[name]["size_bytes"], types[name]["mean_kl"]

    def beats(other: str, name: str) -> bool:
        return cost(other) != cost(name) and all(a <= b for a, b in zip(cost(other), cost(name), strict=True))

    return {name for name in types if not any(beats(other, name) for other in types)}


def plot_rows(types: Mapping[str, Mapping[str, Any]]) -> list[tuple[object, ...]]:
    """PLOT_COLUMNS of every type; `pareto` is yes where no other type is both smaller and nearer."""
    front = pareto_front(types)
    return [
        (name, *(figures[key] for key in PLOT_COLUMNS[1:-1]), "yes" if name in front else "no")
        for name, figures in types.items()
    ]


def check_budgets(settings: QuantizeGguf, types: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise one ExportError that names every budget exceeded, with the value seen and what to do."""
    faults = []
    for entry in settings.types:
        seen = types[entry.type]
        ratio, kl, agreement = seen["perplexity_ratio"], seen["mean_kl"], seen["top1_agreement"]
        # Written so that a value that is not a number breaks its budget.
        limits = (
            ("max_perplexity_ratio", ratio, not ratio <= entry.max_perplexity_ratio),
            ("max_mean_kl", kl, not kl <= entry.max_mean_kl),
            ("min_top1_agreement", agreement, not agreement >= entry.min_top1_agreement),
        )
        faults += [
            f"{entry.type}: {key.partition('_')[2]} is {value:.6g}, {key} is {getattr(entry, key)}"
            for key, value, broken in limits
            if broken
        ]
    if faults:
        raise ExportError(
            "quantisation costs more than its budget:\n  " + "\n  ".join(faults),
            "quantize_gguf.types",
            "drop the type, set quantize_gguf.importance_matrix_rows: 256 (or more), or change the budget's key to a "
            "loss that you accept; all figures are in metrics/quantize_gguf.json",
        )


def table(types: Mapping[str, Mapping[str, Any]], speed: Mapping[str, Mapping[str, Any]]) -> str:
    """What each type costs and gives, a line each, for the log; the last column names the types of the Pareto front."""
    front = pareto_front(types)
    rows: list[Sequence[str]] = [HEADINGS]
    for name, figures in types.items():
        fast = speed[name]
        rows.append(
            (
                name,
                f"{figures['size_bytes'] / MIB:.1f}",
                f"{figures['perplexity_ratio']:.4f}",
                f"{figures['mean_kl']:.6f}",
                f"{figures['top1_agreement']:.1%}",
                f"{fast['prompt_tokens_per_s']:.0f}",
                f"{fast['new_tokens_per_s']:.0f}",
                "?" if fast["peak_rss_mib"] is None else f"{fast['peak_rss_mib']:.0f}",
                "Pareto" if name in front else "",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
