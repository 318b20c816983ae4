"""Counted words -> the merges of a byte-level BPE, in the order in which the `tokenizers` library would learn them.

The most frequent pair comes first; of equally frequent ones, the pair of smaller ids. All words lie in one array, so
that a merge is a few vector operations over the places where its pair stands. Only pairs above a cutoff are followed:
below it are millions, nearly none of which is ever merged. When the best pair falls below it, the array is packed and
all its pairs are counted anew, with a lower cutoff.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.data.vocabulary.word_counts import WordCounts
from finetune.errors import DataError
from finetune.pretokenizer import byte_characters

Indexes = npt.NDArray[np.int32]
Counts = npt.NDArray[np.int64]
Weights = npt.NDArray[np.integer[Any]]

# What stands between two words, and in the place of a symbol that was merged into the one before it.
BOUNDARY, MERGED = -1, -2
ID_BITS = 32
ID_MASK = (1 << ID_BITS) - 1
# Pairs are counted anew when the best one has fallen to this part of what it was: 0.7 s for a million words. A larger
# number costs memory, as each pair that is followed is several Python objects.
CUTOFF_DIVISOR = 8
# Symbols that are counted at a time; 40 bytes of memory each, beside the 12 that every symbol takes throughout.
CHUNK_SYMBOLS = 4 << 20


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, bytes spelled as the library spells them; pairs of ids in the order in which they are merged."""

    tokens: list[str]
    merges: list[tuple[int, int]]


@dataclass(frozen=True)
class _Symbols:
    """Every word as symbols (token ids) in one array, with a BOUNDARY before and after each.

    `spans`: at the first and the last place of a token the number of places that it takes, one for each byte since
    the array was packed; between them nothing that holds. `weights`: how often the symbol's word occurs.
    """

    ids: Indexes
    spans: Indexes
    weights: Weights

    def before(self, places: Indexes) -> Indexes:
        """The first place of the symbol before each."""
        return places - self.spans[places - 1]

    def after(self, places: Indexes) -> Indexes:
        """The first place of the symbol after each."""
        return places + self.spans[places]


@dataclass
class _Pairs:
    """The pairs that occur `cutoff` times or more: a heap of (-count, key), and by key where their left symbols are.

    A count in the heap may be too high, never too low: merges of other pairs take occurrences away, and new ones come
    only with a new token. No pair comes back and no text is spelled by two pairs: within bounds that no merge has
    crossed yet, the same text is always cut in the same way.
    """

    cutoff: int
    heap: list[tuple[int, int]]
    places: dict[int, Indexes]


@dataclass(frozen=True)
class _Groups:
    """Different keys, the sum of the weights of each, and its places: `places[bounds[i]:bounds[i + 1]]`."""

    keys: Counts
    totals: Counts
    places: Indexes
    bounds: npt.NDArray[np.intp]

    def above(self, cutoff: int) -> Iterator[tuple[int, int, Indexes]]:
        """Key, total and places of the groups at or above the cutoff."""
        for at in np.flatnonzero(self.totals >= cutoff).tolist():
            places = self.places[self.bounds[at] : self.bounds[at + 1]]
            yield int(self.keys[at]), int(self.totals[at]), places


def learn(
    words: WordCounts, first: Sequence[str], vocab_size: int, min_frequency: int, report: Callable[[int], object]
) -> Vocabulary:
    """Merge until there are `vocab_size` tokens, or no pair occurs `min_frequency` times.

    `first`: the special tokens, which get the first ids; the 256 bytes come next. `report`: given the number of new
    tokens after each merge.
    """
    tokens = list(dict.fromkeys((*first, *sorted(byte_characters()))))
    ids = {token: index for index, token in enumerate(tokens)}
    merges: list[tuple[int, int]] = []
    symbols = _lay_out(words, ids)
    pairs = _count_all(symbols, min_frequency)
    while len(tokens) < vocab_size:
        key = _most_frequent(symbols, pairs)
        if key is None and pairs.cutoff <= min_frequency:
            break
        if key is None:
            # Its places are most of the memory, and the next ones are made before it would be dropped.
            pairs.places.clear()
            symbols = _packed(symbols)
            pairs = _count_all(symbols, min_frequency)
            continue
        left, right = key >> ID_BITS, key & ID_MASK
        text = tokens[left] + tokens[right]
        # A special token that the text spells is that token, as in the library; then there is no new one.
        is_new = text not in ids
        if is_new:
            ids[text] = len(tokens)
            tokens.append(text)
        merges.append((left, right))
        made = _merge(symbols, pairs.places.pop(key), left == right, ids[text])
        for new_key, total, places in _grouped(*made, symbols.weights).above(pairs.cutoff):
            pairs.places[new_key] = places
            heapq.heappush(pairs.heap, (-total, new_key))
        report(is_new)
    return Vocabulary(tokens, merges)


def _lay_out(words: WordCounts, ids: dict[str, int]) -> _Symbols:
    id_of_byte = np.array([ids[character] for character in byte_characters()], np.int32)
    total = len(words.data) + len(words.counts) + 1
    if total > np.iinfo(np.int32).max:
        raise DataError(f"{total} bytes of different words are too many", "tokenizer.max_words", "lower it")
    inside = np.ones(total, np.bool_)
    inside[words.offsets + np.arange(len(words.offsets))] = False
    symbols = np.full(total, BOUNDARY, np.int32)
    symbols[inside] = id_of_byte[words.data]
    is_small = words.counts.max(initial=0) <= np.iinfo(np.uint32).max
    counts: Weights = words.counts.astype(np.uint32) if is_small else words.counts
    weights = np.zeros(total, counts.dtype)
    weights[inside] = np.repeat(counts, np.diff(words.offsets))
    return _Symbols(symbols, np.ones(total, np.int32), weights)


def _packed(symbols: _Symbols) -> _Symbols:
    """The symbols without the merged ones, in the same memory."""
    standing = symbols.ids != MERGED
    size = int(np.count_nonzero(standing))
    symbols.weights[:size] = symbols.weights[standing]
    symbols.ids[:size] = symbols.ids[standing]
    symbols.spans[:size] = 1
    return _Symbols(symbols.ids[:size], symbols.spans[:size], symbols.weights[:size])


def _count_all(symbols: _Symbols, min_frequency: int) -> _Pairs:
    """Count every pair of a packed array, and follow those at or above a cutoff that comes of the most frequent."""
    counted = [_chunk_counts(symbols, start) for start in _chunk_starts(symbols)]
    keys, group = np.unique(np.concatenate([part for part, _ in counted]), return_inverse=True)
    totals = np.zeros(len(keys), np.int64)
    np.add.at(totals, group, np.concatenate([part for _, part in counted]))
    cutoff = max(min_frequency, int(totals.max(initial=0)) // CUTOFF_DIVISOR)
    keys, totals = keys[totals >= cutoff], totals[totals >= cutoff]
    # Which pair and which place in one number, so that one sort in place puts the places of each pair together.
    found, size = np.empty(len(symbols.ids), np.int64), 0
    for start in _chunk_starts(symbols):
        part = _places_of(symbols, keys, start)
        found[size : size + len(part)] = part
        size += len(part)
    found = found[:size]
    found.sort()
    bounds = np.searchsorted(found, np.arange(len(keys) + 1) << ID_BITS)
    found &= ID_MASK
    places = found.astype(np.int32)
    pairs = _Pairs(cutoff, list(zip((-totals).tolist(), keys.tolist(), strict=True)), {})
    for at, key in enumerate(keys.tolist()):
        pairs.places[key] = places[bounds[at] : bounds[at + 1]]
    heapq.heapify(pairs.heap)
    return pairs


def _chunk_starts(symbols: _Symbols) -> range:
    return range(0, len(symbols.ids), CHUNK_SYMBOLS)


def _chunk_pairs(symbols: _Symbols, start: int) -> tuple[Counts, Indexes]:
    """Keys and places of the pairs whose left symbol is in one chunk of a packed array."""
    ids = symbols.ids[start : start + CHUNK_SYMBOLS + 1]
    standing = ids >= 0
    places = np.flatnonzero(standing[:-1] & standing[1:]).astype(np.int32)
    return _keys(ids[places], ids[places + 1]), places + np.int32(start)


def _chunk_counts(symbols: _Symbols, start: int) -> tuple[Counts, Counts]:
    groups = _grouped(*_chunk_pairs(symbols, start), symbols.weights)
    return groups.keys, groups.totals


def _places_of(symbols: _Symbols, wanted: Counts, start: int) -> Counts:
    """Of one chunk, the pairs that are `wanted` (sorted keys): (index in `wanted`) << ID_BITS | place."""
    keys, places = _chunk_pairs(symbols, start)
    index = np.searchsorted(wanted, keys)
    hits = np.append(wanted, -1)[index] == keys
    found: Counts = (index[hits] << ID_BITS) | places[hits]
    return found


def _most_frequent(symbols: _Symbols, pairs: _Pairs) -> int | None:
    """Key of the pair to merge next, with `places` brought up to date; None when all are below the cutoff."""
    while pairs.heap:
        count, key = heapq.heappop(pairs.heap)
        places = pairs.places[key]
        places = places[symbols.ids[places] == key >> ID_BITS]
        places = places[symbols.ids[symbols.after(places)] == key & ID_MASK]
        pairs.places[key] = places
        now = int(symbols.weights[places].sum(dtype=np.int64))
        if now == -count:
            return key
        if now >= pairs.cutoff:
            heapq.heappush(pairs.heap, (-now, key))
        else:
            del pairs.places[key]
    return None


def _merge(symbols: _Symbols, places: Indexes, twice: bool, merged: int) -> tuple[Counts, Indexes]:
    """Write `merged` over each occurrence of a pair; returns the keys and places of the pairs that it stands in.

    `places`: of the left symbols. `twice`: whether the pair is of one symbol twice, so that occurrences overlap.
    """
    places = np.sort(places)
    ids, spans = symbols.ids, symbols.spans
    if twice:
        places = _every_other(places, symbols.after(places))
    seconds = symbols.after(places)
    previous, following = symbols.before(places), symbols.after(seconds)
    # Two occurrences in a row: the pair between them is of two merged tokens, and is the earlier one's.
    in_a_row = following[:-1] == places[1:]
    ids[places], ids[seconds] = merged, MERGED
    spans[places] = spans[following - 1] = following - places
    has_left, has_right = ids[previous] >= 0, ids[following] >= 0
    has_left[1:] &= ~in_a_row
    previous, at_left, at_right = previous[has_left], places[has_left], places[has_right]
    keys = (_keys(ids[previous], ids[at_left]), _keys(ids[at_right], ids[following[has_right]]))
    return np.concatenate(keys), np.concatenate((previous, at_right))


def _every_other(places: Indexes, following: Indexes) -> Indexes:
    """Of occurrences that overlap, as in `aaa`, the first, third, ... from the left."""
    index = np.arange(len(places))
    starts = np.ones(len(places), np.bool_)
    starts[1:] = places[1:] != following[:-1]
    since = index - np.maximum.accumulate(np.where(starts, index, 0))
    taken: Indexes = places[since % 2 == 0]
    return taken


def _keys(left: Indexes, right: Indexes) -> Counts:
    return (left.astype(np.int64) << ID_BITS) | right


def _grouped(keys: Counts, places: Indexes, weights: Weights) -> _Groups:
    order = np.argsort(keys)
    keys, places = keys[order], places[order]
    starts = np.concatenate((np.zeros(min(len(keys), 1), np.intp), np.flatnonzero(keys[1:] != keys[:-1]) + 1))
    totals = np.add.reduceat(weights[places], starts, dtype=np.int64) if len(keys) else keys
    return _Groups(keys[starts], totals, places, np.append(starts, len(keys)))
