"""Tokenised documents -> rows of at most `pack_tokens` tokens, whole documents only, ahead of the training.

Best-fit decreasing (Johnson, Demers, Ullman, Garey and Graham 1974, doi:10.1137/0203025): the longest document first,
each into the fullest row that still has room.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

from finetune.data.splits import TokenRow, trained_tokens
from finetune.errors import DataError

IGNORED_LABEL = -100


def pack(rows: Sequence[TokenRow], pack_tokens: int, seed: int) -> list[dict[str, Any]]:
    """Packed rows {input_ids, labels, seq_lengths} in an order drawn from `seed`.

    The label of each document's first token is ignored: the token before it belongs to another document.
    Raises DataError when a document is longer than `pack_tokens`, or a trained token got lost.
    """
    bins = _best_fit([len(row["input_ids"]) for row in _ordered(rows)], pack_tokens)
    ordered = _ordered(rows)
    packed = [_row([ordered[index] for index in indices]) for indices in bins]
    before = sum(trained_tokens(row) for row in rows)
    after = sum(label != IGNORED_LABEL for row in packed for label in row["labels"])
    if before != after:
        raise DataError(f"{before} trained tokens before packing, {after} after", "data/tokens", "report this as a bug")
    random.Random(seed).shuffle(packed)  # noqa: S311 (an order to train in, not a secret)
    return packed


def fill(packed: Sequence[dict[str, Any]], pack_tokens: int) -> float:
    """Share of the packed rows' places that hold a token."""
    return sum(len(row["input_ids"]) for row in packed) / (len(packed) * pack_tokens)


def _ordered(rows: Sequence[TokenRow]) -> list[TokenRow]:
    """Longest first; the id decides between equals, so that the order of the input does not matter."""
    return sorted(rows, key=lambda row: (-len(row["input_ids"]), row["id"]))


def _best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of the documents of each row; `lengths` must be in decreasing order."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []
    for index, length in enumerate(lengths):
        if length > capacity:
            raise DataError(
                f"a document has {length} tokens, a packed row holds {capacity}",
                "split.pack_tokens",
                "raise it to tokenize.max_tokens at least, then run `dvc repro`",
            )
        at = bisect_left(room, (length, 0))
        left, number = room.pop(at) if at < len(room) else (capacity, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(index)
        insort(room, (left - length, number))
    return bins


def _row(documents: Sequence[TokenRow]) -> dict[str, Any]:
    input_ids: list[int] = []
    labels: list[int] = []
    for document in documents:
        ids, trained = document["input_ids"], document["trained"]
        input_ids += ids
        labels.append(IGNORED_LABEL)
        labels += [token if learn else IGNORED_LABEL for token, learn in zip(ids[1:], trained[1:], strict=True)]
    return {"input_ids": input_ids, "labels": labels, "seq_lengths": [len(row["input_ids"]) for row in documents]}
