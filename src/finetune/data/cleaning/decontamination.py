"""Which training records share a run of words with a held-out record, or with one of an evaluation set.

Runs stay within one turn of a user or an assistant (or a plain text): system prompts, tool definitions, calls and
results are shared by many records and prove nothing. A run that more than TEMPLATE_RECORDS records of one set have is
the set's own template (a fixed prompt, a form letter) and proves nothing either. A turn of fewer words than a run has
none, so a short question is never contamination.

Memory does not grow with the text: runs of the sets set bits in a map of 512 MiB at most, and only the training runs
that meet such bits, rightly or by chance, are compared one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.data.cleaning.parts import Part, Parts
from finetune.data.cleaning.words import EDGE, I64, U64, UNSPOKEN, hash_runs, hash_words
from finetune.data.workers import batches, ordered_map

# Several questions on one passage are not yet a template; a fixed prompt is in all records. Counted in the set and not
# in training, so that an evaluation text is found however often it was copied.
TEMPLATE_RECORDS = 10
BITS_PER_RUN = 32
MIN_MAP_BITS, MAX_MAP_BITS = 1 << 16, 1 << 32
READ_BYTES = 4 << 20
# Folded text that one worker takes at least.
JOB_BYTES = 8 << 20
HALF = np.uint64(32)
# A run of words, and a record that has it: its row in the part.
RUN = np.dtype([("hash", "<u8"), ("row", "<i8")])
# A run of words that contaminates, the set that it is of, and the index of the set's first record that has it.
PROOF = np.dtype([("set", "<i2"), ("hash", "<u8"), ("record", "<i8")])
Bools = NDArray[np.bool_]
Runs = NDArray[Any]
Proofs = NDArray[Any]


@dataclass(frozen=True)
class Job:
    """A part, the index of its first record, and which of its records are meant."""

    part: Part
    start: int
    chosen: Bools


@dataclass(frozen=True)
class Contaminated:
    """Records to drop, ascending; for each the number of the set that it repeats, and a record of that set."""

    records: I64
    sets: NDArray[np.int16]
    repeated: I64


def contaminated(parts: Parts, sets: NDArray[np.int16], stays: Bools, ngram_words: int, scratch: Path) -> Contaminated:
    """The training records that repeat a record of a set; of several sets the one of the lowest number is named.

    `sets`: the set of each record by index, or -1 for one that is trained on. Records that do not `stay` count for
    nothing. Writes below `scratch` and beside the parts.
    """
    held = _jobs(parts, stays & (sets >= 0))
    learned = _jobs(parts, stays & (sets < 0))
    runs = sum(ordered_map(partial(_write_runs, ngram_words=ngram_words), _together(held)))
    bitmap = scratch / "runs.npy"
    np.save(bitmap, _bit_map((np.load(job.part.path("runs.npy"))["hash"] for job in held), runs))
    meeting = partial(_write_meeting_runs, ngram_words=ngram_words, bitmap=bitmap)
    candidates = _distinct(ordered_map(meeting, _together(learned)))
    return _decide(learned, _proofs(sets, held, candidates))


def _jobs(parts: Parts, chosen: Bools) -> list[Job]:
    return [Job(part, index.start, chosen[index]) for part, index in parts.ranges() if chosen[index].any()]


def runs_of_part(part: Part, chosen: Bools, ngram_words: int) -> Iterator[Runs]:
    """Yield the runs of words of the chosen records, some megabytes of text at a time."""
    for records, ends, content in part.pieces("words", chosen, READ_BYTES):
        raw = np.frombuffer(content, dtype=np.uint8)
        line_ends = np.flatnonzero(raw == EDGE[0]) + 1
        line_starts = np.concatenate([np.zeros(1, dtype=np.int64), line_ends[:-1]])
        hashes, starts = hash_words(content)
        runs, counts = hash_runs(hashes, np.searchsorted(starts, line_ends), ngram_words, whole_if_shorter=False)
        said = raw[line_starts] != UNSPOKEN
        rows = records[np.searchsorted(ends, line_starts[said], side="right")]
        found = np.empty(int(counts[said].sum()), dtype=RUN)
        found["hash"], found["row"] = runs[np.repeat(said, counts)], np.repeat(rows, counts[said])
        yield found


def _together(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    return batches(jobs, lambda job: int(job.part.words_bytes * job.chosen.mean()), JOB_BYTES)


def _write_runs(jobs: Sequence[Job], ngram_words: int) -> int:
    """Write the runs of the records of sets; gives their number."""
    written = 0
    for job in jobs:
        runs = np.concatenate(list(runs_of_part(job.part, job.chosen, ngram_words)))
        np.save(job.part.path("runs.npy"), runs)
        written += len(runs)
    return written


def _write_meeting_runs(jobs: Sequence[Job], ngram_words: int, bitmap: Path) -> U64:
    """Write the runs that the map lets through; gives their distinct hashes."""
    bits = np.load(bitmap, mmap_mode="r")
    distinct = []
    for job in jobs:
        pieces = runs_of_part(job.part, job.chosen, ngram_words)
        runs = np.concatenate([runs[_is_set(bits, runs["hash"])] for runs in pieces])
        np.save(job.part.path("meeting.npy"), runs)
        distinct.append(np.unique(runs["hash"]))
    return _distinct(distinct)


def _bit_map(hashes_by_part: Iterable[U64], runs: int) -> NDArray[np.uint8]:
    """Two bits for each run, in a map of BITS_PER_RUN bits a run."""
    size = MIN_MAP_BITS
    while size < min(runs * BITS_PER_RUN, MAX_MAP_BITS):
        size *= 2
    bitmap = np.zeros(size // 8, dtype=np.uint8)
    for hashes in hashes_by_part:
        for places in _places(hashes, size):
            ordered = np.sort(places)
            byte = ordered >> np.uint64(3)
            firsts = np.flatnonzero(_changes(byte))
            if len(firsts):
                bitmap[byte[firsts]] |= np.bitwise_or.reduceat(_bit(ordered), firsts)
    return bitmap


def _is_set(bitmap: NDArray[np.uint8], hashes: U64) -> Bools:
    first, second = _places(hashes, len(bitmap) * 8)
    met: Bools = (bitmap[first >> np.uint64(3)] & _bit(first)) != 0
    among = np.flatnonzero(met)
    met[among] = (bitmap[second[among] >> np.uint64(3)] & _bit(second[among])) != 0
    return met


def _places(hashes: U64, size: int) -> tuple[U64, U64]:
    mask = np.uint64(size - 1)
    return hashes & mask, (hashes >> HALF) & mask


def _bit(places: U64) -> NDArray[np.uint8]:
    return np.left_shift(np.uint8(1), (places & np.uint64(7)).astype(np.uint8))


def _distinct(arrays: Iterable[U64]) -> U64:
    return np.unique(np.concatenate([np.zeros(0, dtype=np.uint64), *arrays]))


def _proofs(sets: NDArray[np.int16], held: list[Job], candidates: U64) -> Proofs:
    """The runs of the sets that training records may share, without templates; each with its first record."""
    found = [np.zeros(0, dtype=PROOF)]
    for job in held:
        runs = np.load(job.part.path("runs.npy"))
        runs = runs[_among(candidates, runs["hash"])[0]]
        own = np.empty(len(runs), dtype=PROOF)
        own["hash"], own["record"] = runs["hash"], runs["row"] + job.start
        own["set"] = sets[own["record"]]
        found.append(own)
    proofs = np.concatenate(found)
    proofs = proofs[np.lexsort((proofs["record"], proofs["hash"], proofs["set"]))]
    new_run = _changes(proofs["set"]) | _changes(proofs["hash"])
    new_record = new_run | _changes(proofs["record"])
    number = np.cumsum(new_run) - 1
    records = np.bincount(number, weights=new_record)
    return proofs[new_run][records <= TEMPLATE_RECORDS]


def _decide(learned: list[Job], proofs: Proofs) -> Contaminated:
    records, sets, repeated = [np.zeros(0, np.int64)], [np.zeros(0, np.int16)], [np.zeros(0, np.int64)]
    proofs_of = {number: proofs[proofs["set"] == number] for number in np.unique(proofs["set"])}
    for job in learned:
        runs = np.load(job.part.path("meeting.npy"))
        undecided = np.ones(job.part.records, dtype=bool)
        for number, own in proofs_of.items():
            known, places = _among(own["hash"], runs["hash"])
            rows, firsts = np.unique(runs["row"][known], return_index=True)
            new = undecided[rows]
            undecided[rows] = False
            records.append(rows[new] + job.start)
            sets.append(np.full(len(records[-1]), number, dtype=np.int16))
            repeated.append(own["record"][places[firsts[new]]])
    order = np.argsort(np.concatenate(records))
    return Contaminated(np.concatenate(records)[order], np.concatenate(sets)[order], np.concatenate(repeated)[order])


def _among(ordered: U64, values: U64) -> tuple[Bools, I64]:
    """Which values an ascending array holds, and the place there of each that it holds."""
    places = np.searchsorted(ordered, values)
    places[places == len(ordered)] = 0
    known = ordered[places] == values if len(ordered) else np.zeros(len(values), dtype=bool)
    return known, places[known]


def _changes(values: NDArray[Any]) -> Bools:
    """Where an array differs from the element before; true for the first."""
    changes = np.ones(len(values), dtype=bool)
    changes[1:] = values[1:] != values[:-1]
    return changes
