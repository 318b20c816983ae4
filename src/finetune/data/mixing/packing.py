"""Tokenised documents -> rows of at most `pack_tokens` tokens, whole documents only, ahead of the training.

Best-fit decreasing (Johnson, Demers, Ullman, Garey and Graham 1974, doi:10.1137/0203025): the longest document first,
each into the fullest row that still has room.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from finetune.data.mixing.row_index import Hashes, Integers, Mask
from finetune.data.tables import PACKED

IGNORED_LABEL = -100


def marked(input_ids: Integers, trained: Mask) -> Integers:
    """Token ids and loss mask as one array: an untrained id is turned into its complement, below zero."""
    return np.where(trained, input_ids, ~input_ids)


def pack(values: Integers, lengths: Integers, places: Hashes, pack_tokens: int, seed: str) -> Any:
    """Packed rows {input_ids, labels, seq_lengths} as an Arrow record batch, in an order drawn from `seed`.

    `values`: the documents end to end, as `marked` gives them; `lengths`: tokens of each, at most `pack_tokens`;
    `places`: decides between equals, so that the order of the documents does not matter.
    The label of each document's first token is ignored: the token before it belongs to another document.
    """
    order = np.lexsort((places, -lengths))
    rows = best_fit(lengths[order].tolist(), pack_tokens)
    random.Random(seed).shuffle(rows)  # noqa: S311 (an order to train in, not a secret)
    documents = order[np.fromiter(chain.from_iterable(rows), np.int64, len(order))]
    packed = pa.ListArray.from_arrays(_offsets(lengths), values).take(pa.array(documents)).flatten().to_numpy()
    sizes = lengths[documents]
    labels = np.where(packed < 0, np.int32(IGNORED_LABEL), packed)
    labels[_offsets(sizes)[:-1]] = IGNORED_LABEL
    document_bounds = _offsets(np.array([len(row) for row in rows], np.int32))
    token_bounds = _offsets(sizes)[document_bounds]
    columns = [
        pa.ListArray.from_arrays(token_bounds, np.where(packed < 0, ~packed, packed)),
        pa.ListArray.from_arrays(token_bounds, labels),
        pa.ListArray.from_arrays(document_bounds, sizes),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=PACKED)


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of the documents of each row; `lengths` must be in decreasing order, none above `capacity`."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []
    for index, length in enumerate(lengths):
        at = bisect_left(room, (length, 0))
        if at < len(room):
            left, number = room.pop(at)
            rows[number].append(index)
        else:
            left, number = capacity, len(rows)
            rows.append([index])
        insort(room, (left - length, number))
    return rows


def _offsets(lengths: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Where each list starts in the whole, and the end: a window is far below 2**31 tokens."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)
