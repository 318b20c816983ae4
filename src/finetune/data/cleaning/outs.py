"""Parts and the records that go -> the outs of `clean`, in source order, then file order."""

from __future__ import annotations

import heapq
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from finetune.data.cleaning.counts import SourceCounts
from finetune.data.cleaning.part_writer import dropped_line
from finetune.data.cleaning.parts import TEST, TRAIN, VALIDATION, Part, Parts, Rows
from finetune.data.cleaning.selection import DUPLICATE, NEAR_DUPLICATE, Gone
from finetune.data.rows import Place
from finetune.io import replacing

READ_BYTES = 8 << 20
OUT_OF_USE = {"training": "records.jsonl", "tokenizer": "corpus.jsonl"}
DROPPED = "dropped.jsonl"
UNKNOWN = "unknown"
SPLITS = {TEST: "test", VALIDATION: "validation", TRAIN: "train"}


def join(parts: Parts, ending: str, target: Path) -> None:
    """Make `target` of one file of every part, in order."""
    with _replacing_open(target) as out:
        for part in parts.parts:
            with part.path(ending).open("rb") as handle:
                shutil.copyfileobj(handle, out)


def write_outs(parts: Parts, gone: Gone, uses: Mapping[str, str], cleaned_dir: Path) -> dict[str, SourceCounts]:
    """Write records.jsonl, corpus.jsonl and dropped.jsonl; gives the counts of each source.

    `uses`: source -> training, tokenizer or decontamination; the records of the last are counted and not written.
    """
    counts = {source: SourceCounts() for source in uses}
    with ExitStack() as stack:
        outs = {
            name: stack.enter_context(_replacing_open(cleaned_dir / name)) for name in (*OUT_OF_USE.values(), DROPPED)
        }
        for part, indexes in parts.ranges():
            first, last = np.searchsorted(gone.rows["record"], [indexes.start, indexes.stop])
            own = gone.rows[first:last]
            places = own["record"] - indexes.start
            stays = np.ones(part.records, dtype=bool)
            stays[places] = False
            rows = part.rows()
            first, last = np.searchsorted(gone.partly_compared, [indexes.start, indexes.stop])
            counts[part.source].partly_compared += int(last - first)
            _count(counts[part.source], part, rows[stays], own, gone.reasons)
            if (name := OUT_OF_USE.get(uses[part.source])) is not None:
                for _, _, content in part.pieces("records", stays, READ_BYTES):
                    outs[name].write(content)
            for _, line in heapq.merge(
                _dropped_by_rule(part), _dropped_for_another(part, rows[places], own, gone, parts)
            ):
                outs[DROPPED].write(line)
    return counts


def _count(counts: SourceCounts, part: Part, kept: Rows, gone: Rows, reasons: Sequence[str]) -> None:
    counts.add(part.tally)
    by_reason = dict(zip(reasons, np.bincount(gone["reason"], minlength=len(reasons)).tolist(), strict=True))
    counts.duplicates += by_reason.pop(DUPLICATE)
    counts.near_duplicates += by_reason.pop(NEAR_DUPLICATE)
    counts.dropped.update({reason: count for reason, count in by_reason.items() if count})
    counts.kept += len(kept)
    populations = np.bincount(kept["population"], minlength=len(SPLITS)).tolist()
    counts.kept_of_split.update({name: populations[number] for number, name in SPLITS.items()})
    counts.characters += int(kept["characters"].sum())
    numbers, kept_of_language = np.unique(kept["language"], return_counts=True)
    for number, count in zip(numbers.tolist(), kept_of_language.tolist(), strict=True):
        counts.languages[part.languages[number] or UNKNOWN] += count


def _dropped_by_rule(part: Part) -> Iterator[tuple[int, bytes]]:
    with part.path("dropped").open("rb") as handle:
        for line in handle:
            ordinal, _, dropped = line.partition(b" ")
            yield int(ordinal), dropped


def _dropped_for_another(part: Part, rows: Rows, own: Rows, gone: Gone, parts: Parts) -> Iterator[tuple[int, bytes]]:
    for row, fate in zip(rows, own, strict=True):
        place = Place(part.file, int(row["line"]), int(row["byte_offset"]))
        jaccard = None if math.isnan(fate["jaccard"]) else round(float(fate["jaccard"]), 4)
        reason, kept_id = gone.reasons[fate["reason"]], parts.record_id(int(fate["kept"]))
        yield int(row["ordinal"]), dropped_line(part.source, place, reason, kept_id, jaccard)


@contextmanager
def _replacing_open(target: Path) -> Iterator[BinaryIO]:
    with replacing(target) as temporary, temporary.open("wb") as out:
        yield out
