"""Near-duplicates: MinHash signatures, candidates by bands of them, and each candidate verified by true Jaccard.

A record is compared by the set of its runs of words (shingles). It goes when it shares `min_jaccard` of them with a
record that stays, never because of a chain through one that went too. A record shorter than one shingle has one, all of
its words; one without words has none and is no near-duplicate of anything.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.data.cleaning.words import I64, MULTIPLIER, U64, hash_runs, hash_words, mix
from finetune.data.workers import batches

# A pair that is exactly as similar as asked for becomes a candidate with this chance; the more similar, the surer.
MIN_RECALL = 0.995
# Verified at most, those that share most bands first: keeps a corpus of one template from taking quadratic time.
MAX_CANDIDATES = 128
# Shingles hashed at a time: they and their permutation stay in a core's own cache.
BLOCK_SHINGLES = 1 << 16
# Shingle sets that are kept at hand while pairs are verified, in all.
CACHED_SHINGLES = 1 << 24
LOADED_RECORDS, LOADED_BYTES = 256, 1 << 20
HALF = np.uint64(32)

# A record by its rank, and the numbers of the buckets that it shares with others.
Member = tuple[int, list[int]]


@dataclass(frozen=True)
class Bands:
    """`count` bands of `rows` minima each: two records that agree on a whole band are candidates."""

    count: int
    rows: int


@dataclass(frozen=True)
class NearDuplicate:
    """A record (by its rank) that goes, the one it stands too near to, which stays, and their true Jaccard."""

    rank: int
    kept: int
    jaccard: float


def band_plan(min_jaccard: float, permutations: int) -> Bands:
    """The longest bands (fewest false candidates) that still find a pair of `min_jaccard` with MIN_RECALL."""
    for rows in range(permutations, 1, -1):
        count = permutations // rows
        if 1 - (1 - min_jaccard**rows) ** count >= MIN_RECALL:
            return Bands(count, rows)
    return Bands(permutations, 1)


def shingles(content: bytes, ends: I64, shingle_words: int) -> tuple[U64, I64]:
    """The shingle hashes of texts laid end to end (`ends` in bytes), and how many each text has; not yet distinct."""
    words, starts = hash_words(content)
    return hash_runs(words, np.searchsorted(starts, ends), shingle_words, whole_if_shorter=True)


def band_keys(hashes: U64, counts: I64, bands: Bands) -> U64:
    """Keys (bands, texts) of the MinHash signature of each text; 0 for a text without shingles."""
    permutations = bands.count * bands.rows
    factors = (mix(np.arange(1, permutations + 1, dtype=np.uint64) * MULTIPLIER) >> HALF).astype(np.uint32) | np.uint32(
        1
    )
    offsets = (mix(np.arange(1, permutations + 1, dtype=np.uint64) + MULTIPLIER) >> HALF).astype(np.uint32)
    filled = np.flatnonzero(counts)
    ends = np.cumsum(counts[filled])
    upper_halves = (hashes >> HALF).astype(np.uint32)
    minima = np.zeros((permutations, len(filled)), dtype=np.uint32)
    first = 0
    while first < len(filled):
        begin = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, begin + BLOCK_SHINGLES, side="right")))
        block = upper_halves[begin : int(ends[last - 1])]
        places = np.concatenate([[0], ends[first : last - 1] - begin])
        for row in range(permutations):
            np.minimum.reduceat(block * factors[row] + offsets[row], places, out=minima[row, first:last])
        first = last
    keys = np.zeros((bands.count, len(counts)), dtype=np.uint64)
    for band in range(bands.count):
        key = np.zeros(len(filled), dtype=np.uint64)
        for row in range(band * bands.rows, (band + 1) * bands.rows):
            key = mix(key * MULTIPLIER + minima[row])
        keys[band, filled] = np.maximum(key, np.uint64(1))
    return keys


def jaccard(left: U64, right: U64) -> float:
    """Share of the common ones among all elements of two sorted arrays of distinct numbers."""
    common = len(np.intersect1d(left, right, assume_unique=True))
    return common / (len(left) + len(right) - common)


def near_duplicates(
    keys_by_band: Iterable[U64], text_of: Callable[[int], bytes], min_jaccard: float, shingle_words: int
) -> list[NearDuplicate]:
    """Which records go, in the order of their ranks; one of a lower rank stays rather than one of a higher.

    `keys_by_band`: for each band the keys of all records, by rank, 0 for none. `text_of`: the folded text of a rank.
    Memory: 8 bytes for each shingle of CACHED_SHINGLES, and about 30 for each place of a record in a bucket that it
    shares with others; a record without near ones shares few.
    """
    sets = _ShingleSets(text_of, shingle_words)
    shared_buckets = _SharedBuckets(keys_by_band)
    first_kept = array("q", [-1]) * shared_buckets.count
    more_kept: defaultdict[int, list[int]] = defaultdict(list)
    found = []
    for rank, buckets in _with_sets(shared_buckets, sets):
        shared: Counter[int] = Counter()
        for bucket in buckets:
            if first_kept[bucket] >= 0:
                shared[first_kept[bucket]] += 1
                shared.update(more_kept.get(bucket, ()))
        match = _first_near(rank, shared, sets, min_jaccard) if shared else None
        if match is not None:
            found.append(match)
            continue
        for bucket in buckets:
            if first_kept[bucket] < 0:
                first_kept[bucket] = rank
            else:
                more_kept[bucket].append(rank)
    return found


class _ShingleSets:
    """The sets of shingles of records by rank; the most recently used stay in memory."""

    def __init__(self, text_of: Callable[[int], bytes], shingle_words: int) -> None:
        self._text_of, self._shingle_words = text_of, shingle_words
        self._cache: OrderedDict[int, U64] = OrderedDict()
        self._cached = 0

    def __getitem__(self, rank: int) -> U64:
        if rank not in self._cache:
            self.load([rank])
        self._cache.move_to_end(rank)
        return self._cache[rank]

    def load(self, ranks: Sequence[int]) -> None:
        """Hash the texts of several records at once, which takes a third of the time."""
        texts = ((rank, self._text_of(rank)) for rank in ranks)
        for group in batches(texts, lambda item: len(item[1]), LOADED_BYTES):
            ends = np.cumsum([len(text) for _, text in group])
            hashes, counts = shingles(b"".join(text for _, text in group), ends, self._shingle_words)
            for (rank, _), own in zip(group, np.split(hashes, np.cumsum(counts)[:-1]), strict=True):
                self._cache[rank] = np.unique(own)
                self._cached += len(self._cache[rank])
        while self._cached > CACHED_SHINGLES and len(self._cache) > 1:
            self._cached -= len(self._cache.popitem(last=False)[1])


def _with_sets(records: Iterable[Member], sets: _ShingleSets) -> Iterator[Member]:
    """Yield the records, having loaded the sets of the next LOADED_RECORDS."""
    waiting = iter(records)
    while block := list(islice(waiting, LOADED_RECORDS)):
        sets.load([rank for rank, _ in block])
        yield from block


def _first_near(rank: int, shared: Counter[int], sets: _ShingleSets, min_jaccard: float) -> NearDuplicate | None:
    own = sets[rank]
    for other, _ in sorted(shared.items(), key=lambda item: (-item[1], item[0]))[:MAX_CANDIDATES]:
        theirs = sets[other]
        # The smaller set over the larger bounds the Jaccard from above.
        if min(len(own), len(theirs)) < min_jaccard * max(len(own), len(theirs)):
            continue
        if (similarity := jaccard(own, theirs)) >= min_jaccard:
            return NearDuplicate(rank, other, similarity)
    return None


class _SharedBuckets:
    """The records that share a bucket with others: iterate for each, by rank, with the numbers of those buckets."""

    def __init__(self, keys_by_band: Iterable[U64]) -> None:
        self.count = 0
        members, buckets = [np.zeros(0, dtype=np.uint8)], [np.zeros(0, dtype=np.uint8)]
        for keys in keys_by_band:
            order = np.argsort(keys, kind="stable")
            same = np.concatenate([[False], keys[order[1:]] == keys[order[:-1]], [False]])
            shared = (same[1:] | same[:-1])[: len(keys)] & (keys[order] != 0)
            opens = ~same[:-1][: len(keys)] & shared
            members.append(_compact(order[shared]))
            buckets.append(_compact(np.cumsum(opens)[shared] + (self.count - 1)))
            self.count += int(opens.sum())
        self._ranks, self._buckets = np.concatenate(members), np.concatenate(buckets)
        order = np.argsort(self._ranks, kind="stable")
        self._ranks, self._buckets = self._ranks[order], self._buckets[order]

    def __iter__(self) -> Iterator[Member]:
        firsts = np.flatnonzero(self._ranks[1:] != self._ranks[:-1]) + 1
        for first, last in pairwise([0, *firsts.tolist(), len(self._ranks)]):
            if last > first:
                yield int(self._ranks[first]), self._buckets[first:last].tolist()


def _compact(numbers: I64) -> NDArray[np.unsignedinteger[Any]]:
    """The same numbers in the fewest bytes that hold the largest."""
    return numbers.astype(np.min_scalar_type(int(numbers.max(initial=0))))
