"""packed rows -> the rows of every optimizer step: a pure function of seed, epoch and the number of rows.

An epoch is a permutation of all rows, cut into windows of `batch_rows`; the last one may be shorter. How a window is
spread over processes and micro-batches changes the order of sums and nothing else, so that a run may be resumed, or
repeated with other micro-batches, on the same data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from pyarrow import compute
from torch.utils.data import Sampler

from finetune.errors import DataError

ROWS_PER_READ = 1000
UNTRAINED = -100


Rows = np.ndarray[Any, np.dtype[np.int64]]


@lru_cache(maxsize=2)
def _order(rows: int, seed: int, epoch: int) -> Rows:
    order: Rows = np.random.default_rng((seed, epoch)).permutation(rows)
    order.setflags(write=False)
    return order


@dataclass(frozen=True)
class Windows:
    """Which rows each optimizer step trains on."""

    rows: int
    batch_rows: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        return -(-self.rows // self.batch_rows)

    def of_epoch(self, epoch: int) -> list[Rows]:
        """Row numbers of each step of an epoch, [steps_per_epoch] arrays of `batch_rows` at most."""
        order = _order(self.rows, self.seed, epoch)
        return [order[first : first + self.batch_rows] for first in range(0, self.rows, self.batch_rows)]

    def of_step(self, step: int) -> Rows:
        """Row numbers of an optimizer step; steps count from 0 over all epochs."""
        epoch, window = divmod(step, self.steps_per_epoch)
        first = window * self.batch_rows
        return _order(self.rows, self.seed, epoch)[first : first + self.batch_rows]

    def first_rows(self, epoch: int, steps: int) -> Rows:
        """Row numbers of the first `steps` steps of an epoch."""
        return _order(self.rows, self.seed, epoch)[: steps * self.batch_rows]


class ProcessBatches(Sampler[list[int]]):
    """The micro-batches of one process, as row numbers; `epoch` is set before each pass.

    All processes take as many micro-batches, or they would wait for each other for ever: one without rows left in the
    last window gets the number `windows.rows`, which stands for a row without a trained token.
    """

    def __init__(self, windows: Windows, micro_batch_rows: int, process: int, processes: int) -> None:
        self.windows, self.micro_batch_rows = windows, micro_batch_rows
        self.process, self.processes = process, processes
        self.epoch = 0

    def __len__(self) -> int:
        """Micro-batches of an epoch."""
        full, rest = divmod(self.windows.rows, self.windows.batch_rows)
        taken = self.micro_batch_rows * self.processes
        return full * (self.windows.batch_rows // taken) + -(-rest // taken)

    def __iter__(self) -> Iterator[list[int]]:
        """Micro-batches of `epoch`, in order."""
        size = self.micro_batch_rows
        for window in self.windows.of_epoch(self.epoch):
            for first in range(0, len(window), size * self.processes):
                start = first + self.process * size
                rows: list[int] = window[start : start + size].tolist()
                yield rows or [self.windows.rows]


class PackedRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows by number, and behind the last one a row of two tokens of which none is trained."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows.select_columns(["input_ids", "labels", "seq_lengths"])

    def __len__(self) -> int:
        """Rows, without the one behind them."""
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """One row: input_ids, labels and seq_lengths as lists."""
        if number == len(self.rows):
            return {"input_ids": self.rows[0]["input_ids"][:2], "labels": [UNTRAINED] * 2, "seq_lengths": [2]}
        row: dict[str, Any] = self.rows[number]
        return row


@dataclass(frozen=True)
class RowSizes:
    """Of each row [rows]: its tokens, its trained tokens, and its longest document in tokens."""

    tokens: Rows
    trained: Rows
    longest: Rows


def measure_rows(rows: Dataset) -> RowSizes:
    """Count the tokens of every row in Arrow, a thousand rows at a time; the first token of a document has no loss."""
    parts: list[tuple[Any, Any, Any]] = []
    for batch in rows.select_columns(["labels", "seq_lengths"]).with_format("arrow").iter(batch_size=ROWS_PER_READ):
        lengths = compute.list_value_length(batch["labels"]).to_numpy()
        labels = compute.list_flatten(batch["labels"]).to_numpy()
        documents = compute.list_value_length(batch["seq_lengths"]).to_numpy()
        sizes = compute.list_flatten(batch["seq_lengths"]).to_numpy()
        counted = labels != UNTRAINED
        counted[np.cumsum(sizes) - sizes] = False
        parts.append((lengths, _sums(counted, lengths), np.maximum.reduceat(sizes, np.cumsum(documents) - documents)))
    tokens, trained, longest = (np.concatenate(part).astype(np.int64) for part in zip(*parts, strict=True))
    return RowSizes(tokens, trained, longest)


def _sums(values: Any, lengths: Any) -> Any:
    ends = np.concatenate(([0], np.cumsum(values)))[np.cumsum(lengths)]
    return np.diff(ends, prepend=0)


def trained_until(windows: Windows, trained: Rows, step: int, skipped: Sequence[int]) -> int:
    """Trained tokens of the first `step` steps, without those of `skipped` ones; steps count from 1."""
    epochs, rest = divmod(step, windows.steps_per_epoch)
    counted = epochs * int(trained.sum()) + int(trained[windows.first_rows(epochs, rest)].sum())
    return counted - sum(int(trained[windows.of_step(each - 1)].sum()) for each in skipped)


def check_batches(windows: Windows, trained: Sequence[int] | Any, epochs: int) -> None:
    """Raise DataError for an optimizer step whose rows hold no trained token: its loss would be 0 divided by 0."""
    empty = np.asarray(trained) == 0
    if not empty.any():
        return
    for epoch in range(epochs):
        for window in windows.of_epoch(epoch):
            if empty[window].all():
                rows = ", ".join(map(str, window[:5].tolist()))
                raise DataError(
                    f"a batch of epoch {epoch + 1} has no trained token (rows {rows}; {int(empty.sum())} such rows)",
                    "data/split/packed.parquet",
                    "set tokenize.loss: all, drop the records without an answer, or raise train_qlora.batch_rows",
                )
