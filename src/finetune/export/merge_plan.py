"""base and what was trained, opened -> the tensors of the merged model, file by file, before one of them is computed.

An output table that is the input table stays so as long as both end equal; where an adapter changes one of the two, the
merged model gets an output table of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from finetune.errors import ExportError
from finetune.export.adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    LowRank,
    Rows,
    Table,
    Update,
    read_updates,
    whole_updates,
)
from finetune.export.four_bit import FourBit
from finetune.export.layout import Layout, read_layout
from finetune.export.merged_tensors import Weight, as_held, as_trained, with_low_rank, with_rows, with_table
from finetune.export.weights import BLOCK_VALUES, Planned, Stored, opened, shards_of
from finetune.io import read_json

ANOTHER_BASE = "merge onto the base that the adapter was trained on: dvc repro --force --single-item base"


@dataclass(frozen=True)
class Plan:
    """`files`: by file, its tensors by their name in it. `updates`: the adapter's, by name in the model.

    `changed`: names of weights of which a value has changed so far. `table_rows`: rows of the embedding tables;
    `tied`: they are one.
    """

    files: dict[str, dict[str, Planned]]
    updates: dict[str, Update]
    changed: set[str]
    table_rows: int
    tied: bool

    def check_changed(self, name: str) -> None:
        """Raise ExportError when a weight that is written has an update and no value that it changed.

        A table saved whole may equal the base's, such as a norm that training left as it was.
        """
        if isinstance(self.updates.get(name), LowRank | Rows) and name not in self.changed:
            raise ExportError(
                f"the adapter changes no value of {name}",
                name,
                "train for more steps or with a higher train_qlora.learning_rate: this adapter learned nothing there",
            )


@dataclass(frozen=True)
class Place:
    """A tensor of the base: the file that it is in, what it is called there, and where."""

    shard: str
    called: str
    stored: Stored


@contextmanager
def planned(
    base: Path, adapter: Path, dtype: torch.dtype, trained_ids: Sequence[int], four_bit: FourBit | None
) -> Iterator[Plan]:
    """The merged model of a base and an adapter, or of a base and the model that became of it; their files stay open.

    `four_bit`: the weights that are taken as training saw them, null for the base's own. Raises ExportError for an
    update that finds no weight of its shape, and for an adapter that cannot be merged.
    """
    layout = read_layout(base)
    with ExitStack() as stack:
        places = {}
        for shard in shards_of(base):
            for called, stored in stack.enter_context(opened(shard)).items():
                if not layout.is_mask(called):
                    places[layout.name_of(called)] = Place(shard.name, called, stored)
        updates = _open_updates(stack, adapter, layout, trained_ids)
        tied = _settle_tables(layout, places, updates)
        # The copy of a tied table that some makers keep follows the table.
        followed = {layout.output_table: updates.get(layout.input_table)} if tied else {}
        trained = set() if four_bit is None else four_bit.weights
        if missing := sorted({*updates, *trained} - set(places)):
            raise ExportError(
                f"{len(missing)} adapter weights have no counterpart in the base, such as {missing[0]}",
                base,
                ANOTHER_BASE,
            )
        changed: set[str] = set()
        files: dict[str, dict[str, Planned]] = {}
        for name, place in places.items():
            stored, kept = place.stored, four_bit if name in trained else None
            wanted = dtype if stored.dtype.is_floating_point else stored.dtype
            weight = Weight(name, stored, wanted, name in layout.transposed, kept, changed)
            update = updates.get(name, followed.get(name))
            if isinstance(update, Table) and name in (layout.input_table, layout.output_table):
                tensor = _planned_table(weight, update, trained_ids)
            else:
                tensor = _planned(weight, update)
            files.setdefault(place.shard, {})[place.called] = tensor
        yield Plan(files, updates, changed, _table_rows(layout, files, tied), tied)


def _open_updates(stack: ExitStack, adapter: Path, layout: Layout, trained_ids: Sequence[int]) -> dict[str, Update]:
    if (adapter / CONFIG_FILE).is_file():
        tensors = stack.enter_context(opened(adapter / WEIGHTS_FILE))
        return read_updates(read_json(adapter / CONFIG_FILE), tensors, layout, trained_ids, adapter)
    whole: dict[str, Stored] = {}
    for shard in shards_of(adapter):
        whole |= stack.enter_context(opened(shard))
    return whole_updates(whole, layout, adapter)


def _planned_table(weight: Weight, update: Table, trained_ids: Sequence[int]) -> Planned:
    """An embedding table that was trained whole: it may have more rows than the base's, those of new tokens."""
    held, rows = weight.stored.shape[0], max([weight.stored.shape[0], *(number + 1 for number in trained_ids)])
    if rows == held:
        _check_shape(weight.name, weight.stored.shape, update.values.shape)
    elif update.values.shape != (rows, weight.stored.shape[1]):
        _refuse(weight.name, f"needs {rows} rows for the new tokens, and is {update.values.shape} in the adapter")
    return Planned(weight.name, weight.dtype, update.values.shape, partial(with_table, weight, update.values))


def _planned(weight: Weight, update: Update | None) -> Planned:
    shape = weight.stored.shape
    if isinstance(update, LowRank):
        wanted = (update.b.shape[0], update.a.shape[1])
        _check_shape(weight.name, shape[::-1] if weight.transposed else shape, wanted)
        return Planned(weight.name, weight.dtype, shape, partial(with_low_rank, weight, update))
    if isinstance(update, Table):
        _check_shape(weight.name, shape, update.values.shape)
        return Planned(weight.name, weight.dtype, shape, partial(with_table, weight, update.values))
    if isinstance(update, Rows):
        held, width = shape
        rows = max(held, update.ids[-1] + 1)
        if width != update.values.shape[1]:
            _refuse(weight.name, f"is {width} wide in the base and {update.values.shape[1]} in the adapter")
        if unfilled := sorted(set(range(held, rows)) - set(update.ids)):
            _refuse(weight.name, f"has {held} rows in the base, and the adapter leaves row {unfilled[0]} empty")
        return Planned(weight.name, weight.dtype, (rows, width), partial(with_rows, weight, update, rows))
    kept = as_held if weight.four_bit is None else as_trained
    return Planned(weight.name, weight.dtype, shape, partial(kept, weight))


def _check_shape(name: str, held: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if held != wanted:
        _refuse(name, f"is {held} in the base and {wanted} in the adapter")


def _refuse(name: str, fault: str) -> None:
    raise ExportError(f"{name} {fault}", name, "merge onto the base that the adapter was trained on")


def _settle_tables(layout: Layout, places: dict[str, Place], updates: dict[str, Update]) -> bool:
    """Whether the tables stay one; gives the output table a place of its own where they do not.

    Rows of new tokens are trained for both at once (PEFT ties them), and so is a table saved whole of which both have
    the same values. Every other update is one of one table alone, while the other keeps what the base has.
    """
    if not layout.tied:
        return False
    first, last = updates.get(layout.input_table), updates.get(layout.output_table)
    if isinstance(first, Table) and isinstance(last, Table) and _equal(first.values, last.values):
        del updates[layout.output_table]
        return True
    if last is None and (first is None or isinstance(first, Rows)):
        return True
    table = places[layout.input_table]
    places.setdefault(layout.output_table, replace(table, called=layout.output_table))
    return False


def _equal(one: Stored, other: Stored) -> bool:
    if one is other:
        return True
    parts = range(0, one.count, BLOCK_VALUES)
    return (one.dtype, one.shape) == (other.dtype, other.shape) and all(
        torch.equal(*(each.read(first, min(first + BLOCK_VALUES, one.count)) for each in (one, other)))
        for first in parts
    )


def _table_rows(layout: Layout, files: dict[str, dict[str, Planned]], tied: bool) -> int:
    rows = {each.name: each.shape[0] for tensors in files.values() for each in tensors.values() if each.shape}
    first, last = rows[layout.input_table], rows.get(layout.output_table)
    if not tied and last != first:
        _refuse(layout.output_table, f"would have {last} rows, and the input table {first}")
    return first
