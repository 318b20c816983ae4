"""Exact duplicates: records that say the same, whatever their case and white space."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from finetune.data.cleaning.words import I64, U64, Folded

KEY_BYTES = 16
# White space to Python, so that no folded text holds it.
BETWEEN = "\x1e"


def content_key(texts: Folded) -> bytes:
    """16 bytes that two records share when their roles, texts, calls and tools are the same, folded."""
    parts = [part for turn in texts.turns for part in turn]
    return blake2b(BETWEEN.join([*parts, texts.tools, texts.text]).encode(), digest_size=KEY_BYTES).digest()


def duplicates(keys: U64) -> tuple[I64, I64]:
    """The ranks of all records whose key (two numbers a row, by rank) came before, and the first rank that has it."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    ordered = keys[order]
    opens = np.ones(len(order), dtype=bool)
    opens[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    firsts = order[np.flatnonzero(opens)]
    again = np.flatnonzero(~opens)
    gone, kept = order[again], firsts[np.cumsum(opens)[again] - 1]
    by_rank = np.argsort(gone)
    return gone[by_rank], kept[by_rank]
