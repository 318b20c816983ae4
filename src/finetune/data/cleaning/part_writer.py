"""Rows of one chunk of a file -> parts on disk, with everything about a record that needs no other record."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from finetune.data.cleaning.dedup import content_key
from finetune.data.cleaning.near_duplicates import Bands, band_keys, shingles
from finetune.data.cleaning.parts import ROW_BYTES, Part, Tally
from finetune.data.cleaning.words import U64, fold, lines_of
from finetune.data.record import Record
from finetune.data.rows import Fault, Place

# Folded texts whose shingles are hashed at a time; memory is about 20 times that.
BATCH_BYTES = 1 << 20


class PartWriter:
    """Writes one part; memory is that of its bands. `bytes`: of records so far; `close` gives the part."""

    def __init__(self, stem: Path, source: str, file: str, shingle_words: int, bands: Bands | None) -> None:
        self.bytes, self.tally = 0, Tally()
        self._part = Part(stem, source, file, 0, 0, (), self.tally, None)
        self._shingle_words, self._band_plan = shingle_words, bands
        self._open = {
            ending: self._part.path(ending).open("wb")
            for ending in ("records", "words", "rows", "bands", "quarantine", "repaired", "dropped")
        }
        self._first_fault: str | None = None
        self._records = self._words_end = self._batch_bytes = 0
        self._batch: list[bytes] = []
        self._bands: list[U64] = []
        self._languages: dict[str | None, int] = {}

    def quarantine(self, fault: Fault) -> None:
        """Keep a row that cannot be read, with its bytes."""
        self.tally.quarantined[fault.reason] += 1
        if self._first_fault is None:
            self._first_fault = f"{fault.place.file}:{fault.place.line}: {fault.reason}: {fault.detail}"
        self._open["quarantine"].write(json_line(fault.to_row()))

    def drop(self, ordinal: int, place: Place, reason: str) -> None:
        """Note a row that a rule drops."""
        self.tally.dropped[reason] += 1
        line = dropped_line(self._part.source, place, reason, None, None)
        self._open["dropped"].write(b"%d %b" % (ordinal, line))

    def keep_original(self, place: Place, repaired_id: str, original: Record) -> None:
        """Note what a record was before its mojibake or entities were repaired."""
        where = {"file": place.file, "line": place.line, "repaired_id": repaired_id}
        self._open["repaired"].write(json_line({**where, "original": original.to_row()}))

    def add(self, ordinal: int, place: Place, record: Record, population: int) -> None:
        """Write a record that no rule drops."""
        texts = fold(record)
        line, words = record_line(record), lines_of(texts)
        self._open["records"].write(line)
        self._open["words"].write(words)
        self.bytes += len(line)
        self._words_end += len(words)
        self._batch_bytes += len(words)
        self._batch.append(words)
        language = self._languages.setdefault(record.language, len(self._languages))
        self._records += 1
        row = ROW_BYTES.pack(
            bytes.fromhex(record.id),
            ordinal,
            place.line,
            place.byte_offset,
            content_key(texts),
            self.bytes,
            self._words_end,
            len(record.all_text()),
            language,
            population,
        )
        self._open["rows"].write(row)
        if self._batch_bytes >= BATCH_BYTES:
            self._sign_batch()

    def close(self) -> Part:
        """Write what is left, and give the part."""
        self._sign_batch()
        if self._bands:
            self._open["bands"].write(np.concatenate(self._bands, axis=1).tobytes())
        for handle in self._open.values():
            handle.close()
        return replace(
            self._part,
            records=self._records,
            words_bytes=self._words_end,
            languages=tuple(self._languages),
            first_fault=self._first_fault,
        )

    def _sign_batch(self) -> None:
        if self._band_plan is not None and self._batch:
            ends = np.cumsum([len(words) for words in self._batch])
            hashes, counts = shingles(b"".join(self._batch), ends, self._shingle_words)
            self._bands.append(band_keys(hashes, counts, self._band_plan))
        self._batch, self._batch_bytes = [], 0


def json_line(row: dict[str, Any]) -> bytes:
    """One line of JSON with sorted keys."""
    return orjson.dumps(row, option=orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE)


def record_line(record: Record) -> bytes:
    """The line of `record.to_row()`; spelled out, as `dataclasses.asdict` takes longer than all the rest."""
    messages = [
        {"content": message.content, "role": message.role, "tool_calls": message.tool_calls}
        for message in record.messages
    ]
    return json_line({**vars(record), "messages": messages})


def dropped_line(source: str, place: Place, reason: str, kept_id: str | None, jaccard: float | None) -> bytes:
    """The line of dropped.jsonl."""
    where = {"file": place.file, "line": place.line, "byte_offset": place.byte_offset, "source": source}
    return json_line({**where, "reason": reason, "kept_id": kept_id, "jaccard": jaccard})
