"""Examined records on disk between the passes of `clean`: parts of bounded size, in source order, then file order.

A part holds its records as JSON lines (`.records`), their folded texts (`.words`), a row of numbers for each (`.rows`)
and the keys of their MinHash bands, one band after the other (`.bands`); beside them the lines that go out as they are
(`.quarantine`, `.repaired`), and those of rows that a rule dropped, each after its row's ordinal (`.dropped`).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from struct import Struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.data.cleaning.words import I64, U64

# Where a record belongs, in the order of who stays among duplicates: the held-out sets first, so that what was held out
# once never comes into training because a copy of it was added.
TEST, VALIDATION, TRAIN, TOKENIZER, EVALUATION = range(5)
ID_BYTES = 32
ROW = np.dtype(
    [
        ("id", "u1", (ID_BYTES,)),
        ("ordinal", "<i8"),
        ("line", "<i8"),
        ("byte_offset", "<i8"),
        ("key", "<u8", (2,)),
        ("record_end", "<i8"),
        ("words_end", "<i8"),
        ("characters", "<i8"),
        ("language", "<i4"),
        ("population", "u1"),
    ]
)
# The same for one record.
ROW_BYTES = Struct("<32sqqq16sqqqiB")
Rows = NDArray[Any]


@dataclass
class Tally:
    """What became of rows before records are compared with each other."""

    rows_in: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    repaired_texts: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Part:
    """A part on disk. `stem`: path of its files without the endings; `languages`: what the numbers of its rows mean."""

    stem: Path
    source: str
    file: str
    records: int
    words_bytes: int
    languages: tuple[str | None, ...]
    tally: Tally
    first_fault: str | None

    def to_json(self) -> dict[str, Any]:
        """Everything but its folder."""
        return {**vars(self), "stem": self.stem.name, "tally": vars(self.tally)}

    @classmethod
    def from_json(cls, folder: Path, value: dict[str, Any]) -> Part:
        """The part whose files are in `folder`."""
        tally = value["tally"]
        counts = {name: Counter(tally[name]) for name in ("quarantined", "dropped", "repaired_texts")}
        named = {"stem": folder / value["stem"], "languages": tuple(value["languages"])}
        return cls(**{**value, **named, "tally": Tally(tally["rows_in"], **counts)})

    def path(self, ending: str) -> Path:
        """One of its files."""
        return self.stem.with_name(f"{self.stem.name}.{ending}")

    def rows(self) -> Rows:
        """Its rows of numbers."""
        return np.fromfile(self.path("rows"), dtype=ROW)

    def bands(self, band: int) -> U64:
        """The keys of its records in one band."""
        keys: U64 = np.fromfile(self.path("bands"), np.uint64, self.records, offset=8 * self.records * band)
        return keys

    def pieces(self, ending: str, chosen: NDArray[np.bool_], max_bytes: int) -> Iterator[tuple[I64, I64, bytes]]:
        """Yield the chosen records of `.records` or `.words`, of about `max_bytes` of the file at a time.

        Each piece: the numbers of its records in the part, where each ends in the content, the content.
        """
        ends = self.rows()["record_end" if ending == "records" else "words_end"]
        with self.path(ending).open("rb") as handle:
            first = 0
            while first < self.records:
                begin = int(ends[first - 1]) if first else 0
                last = max(first + 1, int(np.searchsorted(ends, begin + max_bytes, side="right")))
                content = handle.read(int(ends[last - 1]) - begin)
                borders = np.concatenate([np.zeros(1, dtype=np.int64), ends[first:last] - begin])
                here = chosen[first:last]
                edges = borders[np.flatnonzero(np.diff(here, prepend=False, append=False))].reshape(-1, 2)
                if len(edges):
                    sizes = np.diff(borders)[here]
                    yield (
                        first + np.flatnonzero(here),
                        np.cumsum(sizes),
                        b"".join(content[a:b] for a, b in edges.tolist()),
                    )
                first = last


class Parts:
    """All parts; a record's index counts through them in order."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = list(parts)
        self.starts: I64 = np.concatenate([[0], np.cumsum([part.records for part in parts], dtype=np.int64)])
        self.records = int(self.starts[-1])
        self._words_ends: I64 = self.column("words_end")

    def column(self, name: str) -> NDArray[Any]:
        """One number of every record, by index, in memory."""
        shape, kind = ROW[name].shape, ROW[name].base
        values = np.empty((self.records, *shape), dtype=kind)
        for part, chosen in self.ranges():
            values[chosen] = part.rows()[name]
        return values

    def band(self, band: int) -> U64:
        """The keys of every record in one band, by index, in memory."""
        keys = np.empty(self.records, dtype=np.uint64)
        for part, chosen in self.ranges():
            keys[chosen] = part.bands(band)
        return keys

    def ranges(self) -> Iterator[tuple[Part, slice]]:
        """Each part with its range of indexes."""
        for part, first, last in zip(self.parts, self.starts[:-1], self.starts[1:], strict=True):
            yield part, slice(int(first), int(last))

    def words(self, index: int) -> bytes:
        """The folded text of one record."""
        part, row = self._locate(index)
        begin = int(self._words_ends[index - 1]) if row else 0
        return _read(part.path("words"), begin, int(self._words_ends[index]) - begin)

    def record_id(self, index: int) -> str:
        """The id of one record."""
        part, row = self._locate(index)
        return _read(part.path("rows"), row * ROW.itemsize, ID_BYTES).hex()

    def _locate(self, index: int) -> tuple[Part, int]:
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.parts[number], index - int(self.starts[number])


def _read(path: Path, begin: int, size: int) -> bytes:
    handle = os.open(path, os.O_RDONLY)
    try:
        return os.pread(handle, size, begin)
    finally:
        os.close(handle)
