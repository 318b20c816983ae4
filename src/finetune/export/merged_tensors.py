"""a stored weight and its update -> the merged weight in blocks: the sum in float32, rounded once.

A block is some rows as the file holds them: of [out, in] weights those of some outputs, of [in, out] ones (Conv1D) of
some inputs. So no weight is ever held whole, but for the 4-bit values of a Conv1D weight, whose blocks of 64 lie across
its rows: GPT-2's largest has 10 million.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from finetune.errors import ExportError
from finetune.export.adapter import LowRank, Rows
from finetune.export.four_bit import FourBit
from finetune.export.weights import Blocks, Stored, rows_per_block

HeldRows = Callable[[int, int], torch.Tensor]


@dataclass(frozen=True)
class Weight:
    """A weight of the base by its name in the model: what its file holds, and the dtype that the merged one gets.

    `transposed`: held as [in, out]. `four_bit`: take the values that training saw instead of those of the file.
    `changed` collects the names of weights of which some value, rounded to `dtype`, is another one than before.
    """

    name: str
    stored: Stored
    dtype: torch.dtype
    transposed: bool
    four_bit: FourBit | None
    changed: set[str] = field(compare=False)

    @property
    def step(self) -> int:
        """How many rows are computed at a time."""
        width = self.stored.shape[1]
        return rows_per_block(width, self.four_bit.rows_multiple_of(width) if self.four_bit else 1)

    def held_rows(self) -> HeldRows:
        """A function that gives rows [rows, width] in float32, afresh each time: the caller may change them."""
        stored, width = self.stored, self.stored.shape[1]

        def as_stored(first: int, last: int) -> torch.Tensor:
            return stored.read(first * width, last * width).view(-1, width)

        if self.four_bit is None:
            return lambda first, last: as_stored(first, last).float()
        if self.transposed:
            turned = stored.whole().T.contiguous()
            whole = self.four_bit.by_rows([turned], turned.shape[1])(turned, 0).T.contiguous()
            return lambda first, last: whole[first:last].float().clone()
        rows, step = stored.shape[0], self.step
        parts = (as_stored(first, min(first + step, rows)) for first in range(0, rows, step))
        values = self.four_bit.by_rows(parts, width)
        return lambda first, last: values(as_stored(first, last), first).float()

    def compare(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Note whether values differ from those before; NaN never counts as equal."""
        if not torch.equal(before, after):
            self.changed.add(self.name)

    def rounded(self, values: torch.Tensor) -> torch.Tensor:
        """Values in the merged dtype; raises ExportError for one that it cannot hold."""
        low, high = torch.aminmax(values)
        limit = torch.finfo(self.dtype).max
        if not (-limit <= float(low) and float(high) <= limit):
            raise ExportError(
                f"{self.name} has infinite or undefined values after the merge", self.name, "use merge.dtype: bfloat16"
            )
        return values.to(self.dtype)


def as_held(weight: Weight) -> Blocks:
    """A tensor that nothing changes but its dtype; where that is the same, its bytes are copied."""
    stored = weight.stored

    def compute(first: int, last: int) -> torch.Tensor:
        values = stored.read(first, last)
        return values if stored.dtype == weight.dtype else weight.rounded(values)

    return Blocks(stored.count, 1, rows_per_block(1), compute)


def as_trained(weight: Weight) -> Blocks:
    """A weight that no update changes, with the values of its 4-bit form."""
    held = weight.held_rows()
    rows, width = weight.stored.shape
    return Blocks(rows, width, weight.step, lambda first, last: weight.rounded(held(first, last)).flatten())


def with_low_rank(weight: Weight, update: LowRank) -> Blocks:
    """W + scale * B A, and with DoRA each output's row brought to its magnitude.

    The product is numpy's (OpenBLAS, its kernels for Haswell): MKL, which torch calls, is held to the branch that all
    processors share (finetune/runtime.py), and that one takes twice as long (benchmarks/merge_shards.py).
    """
    rows, width = weight.stored.shape
    held, step = weight.held_rows(), weight.step
    a, b = update.a.whole().float().numpy(), (update.scale * update.b.whole().float()).numpy()

    def added(first: int, last: int) -> torch.Tensor:
        part = np.matmul(a[:, first:last].T, b.T) if weight.transposed else np.matmul(b[first:last], a)
        return torch.from_numpy(part)

    magnitude = None if update.magnitude is None else update.magnitude.whole().float()
    lengths = None
    if magnitude is not None and weight.transposed:
        squares = torch.zeros(width, dtype=torch.float64)
        for first in range(0, rows, step):
            last = min(first + step, rows)
            values = held(first, last)
            values += added(first, last)
            squares += values.square().sum(dim=0, dtype=torch.float64)
        lengths = squares.sqrt().float()

    def compute(first: int, last: int) -> torch.Tensor:
        values = held(first, last)
        before = None if weight.name in weight.changed else values.to(weight.dtype, copy=True)
        values += added(first, last)
        if magnitude is not None and lengths is not None:
            values *= magnitude / lengths
        elif magnitude is not None:
            values *= (magnitude[first:last] / values.norm(dim=1))[:, None]
        merged = weight.rounded(values)
        if before is not None:
            weight.compare(before, merged)
        return merged.flatten()

    return Blocks(rows, width, step, compute)


def with_rows(weight: Weight, update: Rows, rows: int) -> Blocks:
    """The table with `rows` rows, those of the update's ids replaced; every other row keeps its values."""
    held, width = weight.stored.shape

    def compute(first: int, last: int) -> torch.Tensor:
        table = torch.empty(last - first, width, dtype=weight.dtype)
        inside = max(first, min(last, held))
        table[: inside - first] = weight.stored.read(first * width, inside * width).view(-1, width)
        start, stop = bisect_left(update.ids, first), bisect_left(update.ids, last)
        if start < stop:
            places = torch.tensor(update.ids[start:stop]) - first
            trained = weight.rounded(update.values.read(start * width, stop * width).view(-1, width))
            known = places < inside - first
            weight.compare(table[places[known]], trained[known])
            if not bool(known.all()):
                weight.changed.add(weight.name)
            table[places] = trained
        return table.flatten()

    return Blocks(rows, width, rows_per_block(width), compute)


def with_table(weight: Weight, saved: Stored) -> Blocks:
    """Another weight in its place, of the same shape or with more rows."""
    held = weight.stored.count

    def compute(first: int, last: int) -> torch.Tensor:
        values = weight.rounded(saved.read(first, last))
        if last > held:
            weight.changed.add(weight.name)
        elif weight.name not in weight.changed:
            weight.compare(weight.stored.read(first, last).to(weight.dtype), values)
        return values

    return Blocks(saved.count, 1, rows_per_block(1), compute)
