"""two models and rows -> how far one's next-token probabilities are from the other's, in bounded memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from finetune.evaluation.perplexity import Comparison, LogitsOf, compare
from finetune.log import progress

# Log-probabilities of so many positions are held in float64: 32 bytes a word of the vocabulary for each.
WINDOW_TOKENS = 256


def divergence(reference: LogitsOf, other: LogitsOf, rows: Sequence[Mapping[str, Any]], label: str) -> dict[str, float]:
    """KL(reference || other) per trained token in nats (`mean_kl`), and the share of equal first choices."""
    total = Comparison()
    for row in progress(rows, len(rows), "row", label):
        ids, trained = row["input_ids"], row["trained"]
        total += compare_row(reference(ids).cpu(), other(ids).cpu(), ids, trained)
    return total.summary()


def compare_row(reference: torch.Tensor, other: torch.Tensor, ids: list[int], trained: Sequence[bool]) -> Comparison:
    """`compare` of a whole row, WINDOW_TOKENS positions at a time."""
    total = Comparison()
    for start in range(0, len(ids), WINDOW_TOKENS):
        inside = [start <= position < start + WINDOW_TOKENS and flag for position, flag in enumerate(trained)]
        if any(inside[1:]):
            total += compare(reference, other, ids, inside)
    return total
