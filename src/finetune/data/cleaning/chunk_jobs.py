"""Chunks of raw files -> parts on disk: rows parsed, repaired and examined one by one, in worker processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from finetune.data.cleaning.examine import examine
from finetune.data.cleaning.near_duplicates import Bands, band_plan
from finetune.data.cleaning.part_writer import PartWriter
from finetune.data.cleaning.parts import EVALUATION, TEST, TOKENIZER, TRAIN, VALIDATION, Part
from finetune.data.cleaning.repair import HTML, MOJIBAKE
from finetune.data.fetching.sources import verified_files
from finetune.data.reading.formats import Chunk, check_file, chunks, parse_chunk
from finetune.data.record import Record
from finetune.data.rows import Fault, Parsed, Row
from finetune.data.splits import assign
from finetune.data.workers import batches, ordered_map
from finetune.data_sections import Clean
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


@dataclass(frozen=True)
class Job:
    """A chunk of a source's file. `number` names its parts; `size_bytes` is its share of the file's."""

    number: int
    chunk: Chunk
    source: Source
    size_bytes: int


def jobs(raw: Path, sources: Sequence[Source]) -> list[Job]:
    """The chunks of all sources, in order; raises DataError on a changed, empty or unfit file."""
    found: list[Job] = []
    for source in sources:
        for file in verified_files(raw, source.name):
            check_file(raw, file, source)
            of_file = chunks(raw, file, source)
            size_bytes = (raw / file).stat().st_size // max(1, len(of_file))
            found += [Job(len(found) + place, chunk, source, size_bytes) for place, chunk in enumerate(of_file)]
    return found


def examine_all(
    raw: Path, chunks_of_files: Sequence[Job], rules: Rules, scratch: Path
) -> Iterator[tuple[int, list[Part]]]:
    """Yield the parts of some chunks at a time, in order, and their size in bytes; the files are below `scratch`."""
    together = batches(chunks_of_files, lambda job: job.size_bytes, JOB_BYTES)
    return ordered_map(partial(_examine_chunks, raw=raw, rules=rules, scratch=scratch), together)


def _examine_chunks(chunks_of_files: Sequence[Job], raw: Path, rules: Rules, scratch: Path) -> tuple[int, list[Part]]:
    parts = [part for job in chunks_of_files for part in _examine_chunk(job, raw, rules, scratch)]
    return sum(job.size_bytes for job in chunks_of_files), parts


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
