"""Near-duplicates: MinHash signatures, candidates by bands of them, and each candidate verified by true Jaccard.

A record is compared by the set of its runs of words (shingles). It goes when it shares `min_jaccard` of them with a
record that stays, never because of a chain through one that went too. A record shorter than one shingle has one, all of
its words; one without words has none and is no near-duplicate of anything.

Work for each record is bounded: of a bucket the first record that stays and the last BUCKET_RECORDS are candidates, and
of all candidates MAX_CANDIDATES are compared. In a corpus of one template most share the template's buckets, and few
the small buckets that tell near ones from the rest; so who shares the smaller buckets is compared first. A record that
stays while candidates were left out is reported as partly compared.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, defaultdict
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
# At most for one record, so that a corpus of one template does not take quadratic time. Near ones often stand close.
BUCKET_RECORDS, MAX_CANDIDATES = 1024, 1024
# Candidates that are compared at once; most near ones are the first.
COMPARED_RECORDS = 128
# Shingles hashed at a time: they and their permutation stay in a core's own cache.
BLOCK_SHINGLES = 1 << 16
# Shingle sets that are kept at hand while pairs are verified, in all.
CACHED_SHINGLES = 1 << 24
LOADED_RECORDS, LOADED_BYTES = 256, 1 << 20
HALF = np.uint64(32)

NONE = array("q")
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


def jaccards(own: U64, others: Sequence[U64]) -> NDArray[np.float64]:
    """Share of the common ones among all elements of a sorted array of distinct numbers and of each other one."""
    sizes = np.array([len(other) for other in others])
    together = np.concatenate(others)
    found = own[np.minimum(np.searchsorted(own, together), len(own) - 1)] == together
    common = np.add.reduceat(found, np.cumsum(sizes) - sizes, dtype=np.int64)
    shares: NDArray[np.float64] = common / (len(own) + sizes - common)
    return shares


def near_duplicates(
    keys_by_band: Iterable[U64], text_of: Callable[[int], bytes], min_jaccard: float, shingle_words: int
) -> tuple[list[NearDuplicate], list[int]]:
    """Which records go, by rank, and the ranks that were partly compared; of two the one of the lower rank stays.

    `keys_by_band`: for each band the keys of all records, by rank, 0 for none. `text_of`: the folded text of a rank.
    Memory: 8 bytes for each shingle of CACHED_SHINGLES, and about 30 for each place of a record in a bucket that it
    shares with others; a record without near ones shares few.
    """
    sets = _ShingleSets(text_of, shingle_words)
    shared_buckets = _SharedBuckets(keys_by_band)
    first_kept = array("q", [-1]) * shared_buckets.count
    more_kept: defaultdict[int, array[int]] = defaultdict(lambda: array("q"))
    found, partly_compared = [], []
    for rank, buckets in _with_sets(shared_buckets, sets):
        in_buckets = [
            (first_kept[bucket], more_kept.get(bucket, NONE)) for bucket in buckets if first_kept[bucket] >= 0
        ]
        candidates, all_compared = _candidates(in_buckets)
        match = _first_near(rank, candidates, sets, min_jaccard)
        if match is not None:
            found.append(match)
            continue
        if not all_compared:
            partly_compared.append(rank)
        for bucket in buckets:
            if first_kept[bucket] < 0:
                first_kept[bucket] = rank
            else:
                more_kept[bucket].append(rank)
    return found, partly_compared


def _candidates(in_buckets: Sequence[tuple[int, array[int]]]) -> tuple[list[int], bool]:
    """Whom to compare a record with, given who stays in each of its buckets; and whether that is all of them."""
    if not in_buckets:
        return [], True
    looked_at = [array("q", [first]) + more[-BUCKET_RECORDS:] for first, more in in_buckets]
    ranks, places = np.unique(np.concatenate(looked_at), return_inverse=True)
    weights = np.repeat([1 / (1 + len(more)) for _, more in in_buckets], [len(own) for own in looked_at])
    order = np.lexsort((ranks, -np.bincount(places, weights=weights)))[:MAX_CANDIDATES]
    left_out = len(order) < len(ranks) or any(len(more) > BUCKET_RECORDS for _, more in in_buckets)
    return ranks[order].tolist(), not left_out


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


def _first_near(rank: int, candidates: Sequence[int], sets: _ShingleSets, min_jaccard: float) -> NearDuplicate | None:
    for first in range(0, len(candidates), COMPARED_RECORDS):
        others = candidates[first : first + COMPARED_RECORDS]
        similarities = jaccards(sets[rank], [sets[other] for other in others])
        near = np.flatnonzero(similarities >= min_jaccard)
        if len(near):
            return NearDuplicate(rank, others[near[0]], float(similarities[near[0]]))
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
