"""scores and answers -> the rows of the metrics file, the plot and the samples file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from finetune.evaluation.generation import prompt_ids, reference_answer
from finetune.evaluation.perplexity import Score

# llama.cpp is compiled on each machine, by its compiler and against its libm: the digits behind these differ.
LLAMA_DECIMALS = {"perplexity": 4, "perplexity_ratio": 5, "mean_kl": 6}


def quantised_figures(measured: Mapping[str, float], merged_perplexity: float) -> dict[str, float]:
    """One type's figures with its perplexity as a ratio to the merged model's, to the decimals that hold everywhere."""
    figures = {**measured, "perplexity_ratio": measured["perplexity"] / merged_perplexity}
    return {
        key: round(value, LLAMA_DECIMALS[key]) if key in LLAMA_DECIMALS else value for key, value in figures.items()
    }


def side_by_side(base: Mapping[str, Score], tuned: Mapping[str, Score]) -> dict[str, Any]:
    """Base beside tuned, over all rows and by source; `perplexity_ratio` is tuned over base."""
    whole_base, whole_tuned = (sum(scores.values(), Score()).summary() for scores in (base, tuned))
    return {
        "base": whole_base,
        "tuned": whole_tuned,
        "perplexity_ratio": whole_tuned["perplexity"] / whole_base["perplexity"],
        "by_source": {name: {"base": base[name].summary(), "tuned": tuned[name].summary()} for name in tuned},
    }


def perplexity_rows(numbers: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """(source, model, perplexity) of every source, for a plot."""
    return [
        (source, model, scores["perplexity"])
        for source, both in numbers["by_source"].items()
        for model, scores in both.items()
    ]


def sample_rows(
    rows: Sequence[Mapping[str, Any]], base: Sequence[str], tuned: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, str]]:
    """Each chosen test row's prompt and own answer with the answers of both models."""
    return [
        {
            "source": row["source"],
            "prompt": tokenizer.decode(prompt_ids(row)),
            "reference": reference_answer(row, tokenizer),
            "base": base_answer,
            "tuned": tuned_answer,
        }
        for row, base_answer, tuned_answer in zip(rows, base, tuned, strict=True)
    ]
