"""The documents of the mix in an order drawn from a seed, in bounded memory: sorted into windows through one file.

Each use of a row has a place in the order by a hash of the seed, the row's id and the use's number, so that the order
does not depend on the order of the file, and new rows only slip in between. A window is a stretch of that order.
"""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from finetune.data.mixing.row_index import Hashes, Integers, RowIndex, bytes_of
from finetune.errors import DataError

# More documents at a time fill packed rows hardly better: 99.96 % with 10,000, 99.99 % with 200,000.
WINDOW_ROWS = 10_000
# 64 MiB of ids; packing a window takes about six times that.
WINDOW_TOKENS = 1 << 24
RUN_TOKENS = 1 << 24


@dataclass(frozen=True)
class Uses:
    """Every use of every chosen row, in the order of the rows: its row, its place in the training order, its window."""

    rows: npt.NDArray[np.int64]
    places: Hashes
    windows: Integers

    @property
    def window_count(self) -> int:
        """How many windows there are; none without a use."""
        return int(self.windows.max(initial=-1)) + 1


def shuffled(index: RowIndex, row_uses: Integers, seed: int, max_rows: int, max_tokens: int) -> Uses:
    """The uses of the rows with their windows: at most `max_rows` uses and `max_tokens` tokens each, or one row."""
    rows = np.repeat(np.arange(len(row_uses)), row_uses)
    first = np.cumsum(row_uses, dtype=np.int64) - row_uses
    number = np.arange(len(rows)) - first[rows]
    salts = np.array([_salt(seed, use) for use in range(int(row_uses.max(initial=0)))], np.uint64)
    places = _scramble(index.keys[rows] ^ salts[number])
    order = np.argsort(places, kind="stable")
    ends = np.cumsum(index.tokens[rows[order]], dtype=np.int64)
    # Windows of equal numbers of rows, rather than a last one of a few rows that fill badly.
    step = -(-len(rows) // -(-len(rows) // max_rows)) if len(rows) else 0
    windows = np.empty(len(rows), np.int32)
    start = window = 0
    while start < len(rows):
        before = int(ends[start - 1]) if start else 0
        stop = min(start + step, int(np.searchsorted(ends, before + max_tokens, side="right")))
        stop = max(stop, start + 1)
        windows[order[start:stop]] = window
        start, window = stop, window + 1
    return Uses(rows, places, windows)


class WindowFile:
    """A nameless temporary file in `folder` that takes documents in the order of the rows and gives them by window.

    It holds 4 bytes for each token of the mix. Memory: RUN_TOKENS tokens three times over, and what a window holds.
    """

    def __init__(self, folder: Path, uses: Uses, index: RowIndex, run_tokens: int = RUN_TOKENS) -> None:
        self.uses, self.run_tokens = uses, run_tokens
        self.tokens = index.tokens[uses.rows].astype(np.int64)
        self.by_window = np.argsort(uses.windows, kind="stable")
        self.bounds = np.searchsorted(uses.windows[self.by_window], np.arange(uses.window_count + 1))
        self.runs: list[npt.NDArray[np.int64]] = []
        self.pending: list[tuple[Any, Integers]] = []
        self.first_use = self.pending_uses = self.pending_tokens = self.written = 0
        self.file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> Self:
        """Nothing to open: the file is there from the start."""
        return self

    def __exit__(self, *_fault: object) -> None:
        """Close the file, which is thereby gone."""
        self.file.close()

    def add(self, documents: Any, times: Integers) -> None:
        """Take the next used rows: an Arrow list of 32-bit numbers per row, and how often each is used."""
        self.pending.append((documents, times))
        uses = int(times.sum(dtype=np.int64))
        start = self.first_use + self.pending_uses
        self.pending_tokens += int(self.tokens[start : start + uses].sum())
        self.pending_uses += uses
        if self.pending_tokens >= self.run_tokens:
            self.flush()

    def flush(self) -> None:
        """Write the pending documents as one run, sorted by window."""
        if not self.pending_uses:
            return
        own = slice(self.first_use, self.first_use + self.pending_uses)
        windows, tokens = self.uses.windows[own], self.tokens[own]
        times = np.concatenate([times for _, times in self.pending])
        documents = pa.concat_arrays([documents for documents, _ in self.pending])
        self.pending.clear()
        chosen = np.repeat(np.arange(len(times)), times)[np.argsort(windows, kind="stable")]
        content = documents.take(pa.array(chosen)).flatten().to_numpy()
        if len(content) != tokens.sum():
            raise DataError("the rows changed while they were read", "data/tokens/tokens.parquet", "run `dvc repro`")
        by_window = np.bincount(windows, weights=tokens, minlength=self.uses.window_count).astype(np.int64)
        self.runs.append(self.written + np.concatenate([[0], np.cumsum(by_window)]))
        self.file.write(bytes_of(content))
        self.written += len(content)
        self.first_use += self.pending_uses
        self.pending_uses = self.pending_tokens = 0

    def read(self, window: int) -> tuple[Integers, Integers, Hashes]:
        """The documents of a window end to end, the length of each in tokens, and its place in the order."""
        self.flush()
        own = self.by_window[self.bounds[window] : self.bounds[window + 1]]
        lengths = self.tokens[own].astype(np.int32)
        values = np.empty(int(lengths.sum(dtype=np.int64)), np.int32)
        view, filled = bytes_of(values), 0
        for run in self.runs:
            size = 4 * int(run[window + 1] - run[window])
            self.file.seek(4 * int(run[window]))
            filled += self.file.readinto(view[filled : filled + size])  # type: ignore[attr-defined]
        if filled != len(view):
            raise DataError(f"{filled} bytes of window {window} instead of {len(view)}", "the temporary file", "retry")
        return values, lengths, self.uses.places[own]


def _salt(seed: int, use: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{use}".encode()).digest()[:8], "big")


def _scramble(values: Hashes) -> Hashes:
    """A one-to-one mixing of 64 bits (the finaliser of SplitMix64, Steele, Lea and Flood 2014)."""
    mixed = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    scrambled: Hashes = mixed ^ (mixed >> np.uint64(31))
    return scrambled
