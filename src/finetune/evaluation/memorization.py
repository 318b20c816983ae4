"""answers + training rows -> how many answers repeat a long span of a training row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.evaluation.generation import Answer
from finetune.log import progress

# Odd, so that it has an inverse modulo 2**64.
MULTIPLIER = 0x9E3779B97F4A7C15
INVERSE = pow(MULTIPLIER, -1, 1 << 64)
# Some 60 bytes a token are held: 60 MB for rows of 8,192 tokens.
ROWS_AT_ONCE = 128

Numbers = npt.NDArray[np.uint64]
Span = tuple[int, ...]


def measure(answers: Mapping[str, Sequence[Answer]], batches: Iterable[Any], span_tokens: int) -> dict[str, Any]:
    """For each model {answers, long_enough, copied, share}: how many answers copy a span of a training row.

    `share` is of all answers; those shorter than a span cannot be copies. The training rows are read once.
    """
    ids = {name: [answer.ids for answer in given] for name, given in answers.items()}
    copied = iter(copied_answers([each for given in ids.values() for each in given], batches, span_tokens))
    figures = {}
    for name, given in ids.items():
        copies = sum(next(copied) for _ in given)
        figures[name] = {
            "answers": len(given),
            "long_enough": sum(len(each) >= span_tokens for each in given),
            "copied": copies,
            "share": copies / len(given),
        }
    return figures


def copied_answers(answers: Sequence[Sequence[int]], batches: Iterable[Any], span_tokens: int) -> list[bool]:
    """Whether each answer holds `span_tokens` consecutive token ids of one training row.

    `batches`: Arrow record batches with a column `input_ids`. Rows are searched for the hashes of the answers' spans,
    and what that finds is compared token by token.
    """
    hashes = [_hashes(np.array(answer, np.uint64), span_tokens) for answer in answers if len(answer) >= span_tokens]
    wanted = np.unique(np.concatenate([np.empty(0, np.uint64), *hashes]))
    found: set[Span] = set()
    for batch in progress(batches, None, "batch", "copies of training rows"):
        for start in range(0, batch.num_rows, ROWS_AT_ONCE):
            column = batch.column("input_ids").slice(start, ROWS_AT_ONCE)
            ids, lengths = column.flatten().to_numpy().astype(np.uint64), np.diff(column.offsets.to_numpy())
            found |= _candidates(ids, lengths, span_tokens, wanted)
    return [any(span in found for span in _spans(answer, span_tokens)) for answer in answers]


def _spans(ids: Sequence[int], tokens: int) -> list[Span]:
    return [tuple(ids[start : start + tokens]) for start in range(len(ids) - tokens + 1)]


def _hashes(ids: Numbers, tokens: int) -> Numbers:
    """For every span, the sum of id * MULTIPLIER**place over its places, modulo 2**64 (M. Rabin and R. Karp, 1987)."""
    powers = np.full(len(ids), MULTIPLIER, np.uint64).cumprod()
    inverses = np.full(len(ids), INVERSE, np.uint64).cumprod()
    sums = np.concatenate([np.zeros(1, np.uint64), (ids * powers).cumsum()])
    hashes: Numbers = (sums[tokens:] - sums[:-tokens]) * inverses[: len(ids) - tokens + 1]
    return hashes


def _candidates(ids: Numbers, lengths: npt.NDArray[Any], tokens: int, wanted: Numbers) -> set[Span]:
    """The spans within one row whose hash is wanted."""
    if len(ids) < tokens or not len(wanted):
        return set()
    hashes = _hashes(ids, tokens)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    within = rows[: len(hashes)] == rows[tokens - 1 :]
    places = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
    hits = np.flatnonzero(within & (wanted[places] == hashes)).tolist()
    return {tuple(ids[start : start + tokens].tolist()) for start in hits}
