"""Which training records share a run of words with a held-out record, or with one of an evaluation set.

Runs stay within one turn of a user or an assistant (or a plain text): system prompts, tool definitions, calls and
results are shared by many records and prove nothing. Of an evaluation set whole questions prove too, so that short ones
are found: a user's turn of at least QUESTION_WORDS words that a training record has as a whole turn. Held-out records
have no such rule: they are drawn from the same records as training, and share short stock answers with them.

Template proves nothing: a fixed instruction, a form letter, "if you have any other question ...". A run (or a question
shorter than a run) is template when more than TEMPLATE_RECORDS records of the set have it, or more than
TEMPLATE_TRAINING_RECORDS training records; exact duplicates do not count. For a question that is as long as a run, only
the records of the set count: nobody says so much by chance, so it is found however often it was copied. Where template
goes over into a text of its own, runs are part of both: a run proves when more than half of its words are in no
template run of the training record.

Memory does not grow with the text: runs of the sets set bits in a map of 512 MiB at most, and only the training runs
that meet such bits, rightly or by chance, are compared one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from finetune.data.cleaning.parts import Part, Parts
from finetune.data.cleaning.words import ASKED, EDGE, I64, U64, UNSPOKEN, hash_runs, hash_segments, hash_words
from finetune.data.workers import batches, ordered_map

# Several questions on one passage are not yet a template; a fixed prompt is in all records.
TEMPLATE_RECORDS = 10
# Twice as many: a text that leaked was copied more often than a set repeats itself. It bounds what one run can drop.
TEMPLATE_TRAINING_RECORDS = 20
# Below it a turn is a greeting or thanks.
QUESTION_WORDS = 5
# Bits of the hash of a whole turn, and of one that is as long as a run; runs have neither.
WHOLE, LONG = np.uint64(1 << 62), np.uint64(1 << 63)
BITS_PER_RUN = 32
MIN_MAP_BITS, MAX_MAP_BITS = 1 << 16, 1 << 32
READ_BYTES = 4 << 20
# Folded text that one worker takes at least.
JOB_BYTES = 8 << 20
HALF = np.uint64(32)
# A run of words (or a whole turn), the row in the part of a record that has it, and the number there of its first word.
RUN = np.dtype([("hash", "<u8"), ("row", "<u4"), ("word", "<u4")])
# A run that a set and training have: the set, whether it is template, and the index of the set's first record with it.
PROOF = np.dtype([("set", "<i2"), ("template", "?"), ("hash", "<u8"), ("record", "<i8")])
Bools = NDArray[np.bool_]
WholeTurns = Literal["none", "asked", "said"]
Runs = NDArray[Any]
Proofs = NDArray[Any]


@dataclass(frozen=True)
class Job:
    """A part, the index of its first record, which of its records are meant, and of which turns the whole counts."""

    part: Part
    start: int
    chosen: Bools
    whole: WholeTurns


@dataclass(frozen=True)
class Contaminated:
    """Records to drop, ascending; for each the number of the set that it repeats, and a record of that set."""

    records: I64
    sets: NDArray[np.int16]
    repeated: I64


def contaminated(parts: Parts, sets: NDArray[np.int16], stays: Bools, ngram_words: int, scratch: Path) -> Contaminated:
    """The training records that repeat a record of a set; of several sets the one of the lowest number is named.

    `sets`: the set of each record by index: 0 held out, above it an evaluation set (all records of a part are of one),
    or -1 for one that is trained on. Records that do not `stay` count for nothing. Writes below `scratch` and beside
    the parts.
    """
    held = _jobs(parts, stays & (sets == 0), "none") + _jobs(parts, stays & (sets > 0), "asked")
    learned = _jobs(parts, stays & (sets < 0), "said")
    runs = sum(ordered_map(partial(_write_runs, ngram_words=ngram_words), _together(held)))
    bitmap = scratch / "runs.npy"
    np.save(bitmap, _bit_map((np.load(job.part.path("runs.npy"))["hash"] for job in held), runs))
    meeting = partial(_write_meeting_runs, ngram_words=ngram_words, bitmap=bitmap)
    candidates = _distinct(ordered_map(meeting, _together(learned)))
    proofs = _proofs(sets, held, candidates)
    proofs["template"] |= _is_training_template(proofs["hash"], learned)
    return _decide(learned, proofs, ngram_words)


def _jobs(parts: Parts, chosen: Bools, whole: WholeTurns) -> list[Job]:
    return [Job(part, index.start, chosen[index], whole) for part, index in parts.ranges() if chosen[index].any()]


def _runs_of(job: Job, ngram_words: int) -> Iterator[Runs]:
    """Yield the runs of words and the whole turns that count, some megabytes of text at a time."""
    words_before = 0
    for records, ends, content in job.part.pieces("words", job.chosen, READ_BYTES):
        raw = np.frombuffer(content, dtype=np.uint8)
        line_ends = np.flatnonzero(raw == EDGE[0]) + 1
        line_starts = np.concatenate([np.zeros(1, dtype=np.int64), line_ends[:-1]])
        hashes, starts = hash_words(content)
        word_ends = np.searchsorted(starts, line_ends)
        words = np.diff(word_ends, prepend=0)
        runs, counts = hash_runs(hashes, word_ends, ngram_words, whole_if_shorter=False)
        rows = records[np.searchsorted(ends, line_starts, side="right")]
        said = raw[line_starts] != UNSPOKEN
        first_words = word_ends - words + words_before
        places = np.arange(len(runs)) + np.repeat(first_words - (np.cumsum(counts) - counts), counts)
        chosen = np.repeat(said, counts)
        yield _as_runs(runs[chosen] & ~(WHOLE | LONG), np.repeat(rows, counts)[chosen], places[chosen])
        if job.whole != "none":
            turns = (said if job.whole == "said" else raw[line_starts] == ASKED) & (words >= QUESTION_WORDS)
            wholes = (hash_segments(hashes, word_ends)[turns] | WHOLE) & ~LONG
            wholes[words[turns] >= ngram_words] |= LONG
            yield _as_runs(wholes, rows[turns], first_words[turns])
        words_before += len(hashes)


def _as_runs(hashes: U64, rows: I64, places: I64) -> Runs:
    runs = np.empty(len(hashes), dtype=RUN)
    runs["hash"], runs["row"], runs["word"] = hashes, rows, places
    return runs


def _together(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    return batches(jobs, lambda job: int(job.part.words_bytes * job.chosen.mean()), JOB_BYTES)


def _write_runs(jobs: Sequence[Job], ngram_words: int) -> int:
    """Write the runs of the records of sets; gives their number."""
    written = 0
    for job in jobs:
        runs = np.concatenate(list(_runs_of(job, ngram_words)))
        np.save(job.part.path("runs.npy"), runs)
        written += len(runs)
    return written


def _write_meeting_runs(jobs: Sequence[Job], ngram_words: int, bitmap: Path) -> U64:
    """Write the runs that the map lets through; gives their distinct hashes."""
    bits = np.load(bitmap, mmap_mode="r")
    distinct = []
    for job in jobs:
        runs = np.concatenate([runs[_is_set(bits, runs["hash"])] for runs in _runs_of(job, ngram_words)])
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
    """The runs of the sets that training records may share, by set and hash, with the sets' own templates."""
    found = [np.zeros(0, dtype=PROOF)]
    for job in held:
        runs = np.load(job.part.path("runs.npy"))
        runs = runs[_among(candidates, runs["hash"])[0]]
        own = np.empty(len(runs), dtype=PROOF)
        own["hash"], own["record"] = runs["hash"], runs["row"].astype(np.int64) + job.start
        own["set"] = sets[own["record"]]
        found.append(own)
    proofs = np.concatenate(found)
    proofs = proofs[np.lexsort((proofs["record"], proofs["hash"], proofs["set"]))]
    new_run = _changes(proofs["set"]) | _changes(proofs["hash"])
    new_record = new_run | _changes(proofs["record"])
    number = np.cumsum(new_run) - 1
    records = np.bincount(number, weights=new_record)
    firsts = proofs[new_run]
    firsts["template"] = records > TEMPLATE_RECORDS
    return firsts


def _is_training_template(runs: U64, learned: list[Job]) -> Bools:
    """Which runs many training records have; memory is one number of 32 bits for each run, besides a part's own."""
    hashes = np.unique(runs)
    records = np.zeros(len(hashes), dtype=np.int32)
    for job in learned:
        met = np.load(job.part.path("meeting.npy"))
        known, places = _among(hashes, met["hash"])
        rows = met["row"][known]
        order = np.lexsort((rows, places))
        new = _changes(places[order]) | _changes(rows[order])
        np.add.at(records, places[order][new], 1)
    return _among(hashes[(records > TEMPLATE_TRAINING_RECORDS) & (hashes < LONG)], runs)[0]


def _proves(runs: Runs, template: Bools, ngram_words: int) -> Bools:
    """Which of a part's runs are no template, and at most half within template runs beside them; `runs` by word."""
    is_run = runs["hash"] < WHOLE
    at = np.concatenate([[-ngram_words], runs["word"][is_run & template], [1 << 33]]).astype(np.int64)
    words = runs["word"].astype(np.int64)
    after = np.searchsorted(at, words)
    left = np.maximum(0, at[np.maximum(after - 1, 0)] + ngram_words - words)
    right = np.maximum(0, words + ngram_words - at[after])
    own_words = ngram_words - left - right
    proves: Bools = ~template & (~is_run | (2 * own_words > ngram_words))
    return proves


def _decide(learned: list[Job], proofs: Proofs, ngram_words: int) -> Contaminated:
    records, sets, repeated = [np.zeros(0, np.int64)], [np.zeros(0, np.int16)], [np.zeros(0, np.int64)]
    proofs_of = {number: proofs[proofs["set"] == number] for number in np.unique(proofs["set"])}
    for job in learned:
        runs = np.load(job.part.path("meeting.npy"))
        undecided = np.ones(job.part.records, dtype=bool)
        for number, own in proofs_of.items():
            known, places = _among(own["hash"], runs["hash"])
            proves = _proves(runs[known], own["template"][places], ngram_words)
            places = places[proves]
            rows, firsts = np.unique(runs["row"][known][proves].astype(np.int64), return_index=True)
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
