"""Chunks of raw files -> parts on disk: rows parsed, repaired and examined one by one, in worker processes.

A chunk is a piece that another machine may have done (finetune.data.shards): which one it is, is said by the file's
SHA-256, its place in the file, its source and the rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from finetune.data.cleaning.examine import examine
from finetune.data.cleaning.near_duplicates import Bands, band_plan
from finetune.data.cleaning.part_writer import PartWriter
from finetune.data.cleaning.parts import EVALUATION, TEST, TOKENIZER, TRAIN, VALIDATION, Part
from finetune.data.cleaning.repair import HTML, MOJIBAKE
from finetune.data.fetching.sources import RawFile, manifest_files, verified_files, verify
from finetune.data.reading.formats import Chunk, check_file, chunks, parse_chunk
from finetune.data.record import Record
from finetune.data.rows import Fault, Parsed, Row
from finetune.data.shards import Shard, Store
from finetune.data.splits import assign
from finetune.data.workers import batches, ordered_map
from finetune.data_sections import Clean
from finetune.log import progress_bar
from finetune.source_sections import Source

# Records of a part; a longer chunk becomes several parts, so that their memory is bounded.
PART_BYTES = 32 << 20
# Small chunks that one worker takes together.
JOB_BYTES = 4 << 20
POPULATIONS = {"test": TEST, "validation": VALIDATION, "train": TRAIN}


@dataclass(frozen=True)
class Rules:
    """What decides about one row: section clean, and the shares of section split."""

    clean: Clean
    validation_share: float
    test_share: float

    def bands(self) -> Bands | None:
        """The MinHash bands by which near-duplicates are looked for."""
        near = self.clean.near_duplicates
        return None if near is None else band_plan(near.min_jaccard, near.permutations)

    def to_json(self) -> dict[str, Any]:
        """All of them, as JSON."""
        return {**vars(self), "clean": self.clean.model_dump(mode="json")}


@dataclass(frozen=True)
class Job:
    """A chunk of a source's file. `number` names its parts; `size_bytes` is its share of the file's."""

    number: int
    chunk: Chunk
    source: Source
    size_bytes: int
    sha256: str

    def piece(self) -> dict[str, Any]:
        """What it is: what its parts depend on besides the rules."""
        return {"file": self.sha256, "chunk": asdict(self.chunk), "source": self.source.model_dump(mode="json")}


class Done(NamedTuple):
    """The parts of some chunks. Of the chunks, `taken` came out of the store, and `damaged` were spoilt there."""

    size_bytes: int
    parts: list[Part]
    taken: int
    damaged: int


def jobs(raw: Path, sources: Sequence[Source]) -> list[Job]:
    """The chunks of all sources, in order; raises DataError on a changed, empty or unfit file."""
    found: list[Job] = []
    for source in sources:
        for file in verified_files(raw, source.name):
            found += _jobs_of(raw, file, source, len(found))
    return found


def jobs_of_shard(raw: Path, sources: Sequence[Source], shard: Shard) -> list[Job]:
    """The chunks of one of several workers, about as many bytes for each; only their files are read.

    Raises DataError as `jobs` does.
    """
    files = [(source, file) for source in sources for file in manifest_files(raw, source.name)]
    total_bytes = sum(file.size_bytes for _, file in files)
    found: list[Job] = []
    before_bytes = 0
    for source, file in files:
        first, last = (shard.number - 1) * total_bytes / shard.count, shard.number * total_bytes / shard.count
        if before_bytes < last and before_bytes + file.size_bytes > first:
            verify(raw, file)
            own = _jobs_of(raw, file, source, len(found))
            starts = [before_bytes + file.size_bytes * place / len(own) for place in range(len(own))]
            found += [job for job, start in zip(own, starts, strict=True) if shard.has(start / total_bytes)]
        before_bytes += file.size_bytes
    return found


def _jobs_of(raw: Path, file: RawFile, source: Source, number: int) -> list[Job]:
    check_file(raw, file.path, source)
    of_file = chunks(raw, file.path, source)
    size_bytes = file.size_bytes // max(1, len(of_file))
    return [Job(number + place, chunk, source, size_bytes, file.sha256) for place, chunk in enumerate(of_file)]


def examine_all(
    raw: Path, chunks_of_files: Sequence[Job], rules: Rules, scratch: Path, store: Store | None
) -> list[Part]:
    """The parts of all chunks, in order; their files are below `scratch`, or in the store where that has them."""
    together = batches(chunks_of_files, lambda job: job.size_bytes, JOB_BYTES)
    work = partial(_examine_chunks, raw=raw, rules=rules, scratch=scratch, store=store)
    done: list[Done] = []
    with progress_bar(sum(job.size_bytes for job in chunks_of_files), 0, "B", "examined") as bar:
        bar.unit_scale = True
        for some in ordered_map(work, together):
            done.append(some)
            bar.update(some.size_bytes)
    if store is not None:
        store.report(len(chunks_of_files), sum(each.taken for each in done), sum(each.damaged for each in done))
    return [part for each in done for part in each.parts]


def make_shard(raw: Path, own: Sequence[Job], rules: Rules, store: Store) -> Iterator[bool]:
    """Put the parts of one worker's chunks into the store; yields for each whether it had to be made."""
    return ordered_map(partial(_make_piece, raw=raw, rules=rules, store=store), own)


def _make_piece(job: Job, raw: Path, rules: Rules, store: Store) -> bool:
    return store.make(job.piece(), lambda folder: [part.to_json() for part in _examine_chunk(job, raw, rules, folder)])


def _examine_chunks(
    chunks_of_files: Sequence[Job], raw: Path, rules: Rules, scratch: Path, store: Store | None
) -> Done:
    parts: list[Part] = []
    taken = damaged = 0
    for job in chunks_of_files:
        found = store.find(job.piece()) if store is not None else None
        if found is not None and found.value is not None:
            parts += [Part.from_json(found.folder, value) for value in found.value]
            taken += 1
            continue
        damaged += found is not None and found.damaged
        parts += _examine_chunk(job, raw, rules, scratch)
    return Done(sum(job.size_bytes for job in chunks_of_files), parts, taken, damaged)


def _examine_chunk(job: Job, raw: Path, rules: Rules, scratch: Path) -> list[Part]:
    parts: list[Part] = []
    writer = _writer(job, 0, rules, scratch)
    for ordinal, row in enumerate(parse_chunk(raw, job.chunk, job.source)):
        if writer.bytes >= PART_BYTES:
            parts.append(writer.close())
            writer = _writer(job, len(parts), rules, scratch)
        _take(ordinal, row, job.source, rules, writer)
    return [*parts, writer.close()]


def _writer(job: Job, number: int, rules: Rules, scratch: Path) -> PartWriter:
    near = rules.clean.near_duplicates
    stem = scratch / f"{job.number:06}-{number:06}"
    return PartWriter(stem, job.source.name, job.chunk.file, near.shingle_words if near else 0, rules.bands())


def _take(ordinal: int, row: Row, source: Source, rules: Rules, writer: PartWriter) -> None:
    writer.tally.rows_in += 1
    if isinstance(row, Fault):
        writer.quarantine(row)
    elif not isinstance(row, Parsed):
        writer.drop(ordinal, row.place, row.reason)
    else:
        examined = examine(row.record, rules.clean)
        writer.tally.repaired_texts += examined.texts_by_repair
        if examined.texts_by_repair[MOJIBAKE] or examined.texts_by_repair[HTML]:
            writer.keep_original(row.place, examined.record.id, row.record)
        # An evaluation set is repaired like the rest, so that its words compare, but what it asks is not ours to judge.
        if examined.reason is not None and source.use != "decontamination":
            writer.drop(ordinal, row.place, examined.reason)
        else:
            writer.add(ordinal, row.place, examined.record, _population(examined.record, source, rules))


def _population(record: Record, source: Source, rules: Rules) -> int:
    match source.use:
        case "training":
            return POPULATIONS[assign(record.group, rules.validation_share, rules.test_share)]
        case "tokenizer":
            return TOKENIZER
        case "decontamination":
            return EVALUATION
