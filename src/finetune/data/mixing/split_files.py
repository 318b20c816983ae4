"""Token rows -> the files of the splits and of the packed training rows, each read or written once, in pieces."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import compute

from finetune.data.mixing.external_shuffle import WindowFile
from finetune.data.mixing.packing import IGNORED_LABEL, marked, pack
from finetune.data.mixing.row_index import Integers, RowIndex
from finetune.data.row_groups import read_batches, row_group_writer
from finetune.data.splits import SPLITS
from finetune.data.tables import PACKED, TOKENS
from finetune.errors import DataError


@dataclass(frozen=True)
class Packed:
    """What packing made: rows, and the share of their places that hold a token."""

    rows: int
    fill: float


def write_splits(
    tokens: Path, folder: Path, index: RowIndex, row_uses: Integers, windows: WindowFile, mini_train_rows: int
) -> int:
    """Write train, validation, test and mini_train; hand the rows of the mix to `windows`. Returns rows of mini_train.

    mini_train has the first training rows by the hash of their id: a sample that stays when data is added.
    Raises DataError when a row got lost.
    """
    parts = {name: index.of_split(name) for name in SPLITS}
    mini = _first_by_key(index, mini_train_rows)
    chosen: list[tuple[npt.NDArray[np.int64], pa.RecordBatch]] = []
    row = 0
    with ExitStack() as stack:
        writers = {name: stack.enter_context(row_group_writer(folder / f"{name}.parquet", TOKENS)) for name in SPLITS}
        for batch in read_batches(tokens):
            here = slice(row, row + batch.num_rows)
            row += batch.num_rows
            rows = {name: _where(batch, part[here]) for name, part in parts.items()}
            for name, writer in writers.items():
                writer.add(rows[name])
            if mini[here].any():
                chosen.append((np.flatnonzero(mini[here]) + here.start, _where(batch, mini[here])))
            uses = row_uses[here][parts["train"][here]]
            windows.add(_marked_documents(_where(rows["train"], uses > 0)), uses[uses > 0])
    lost = {name: int(parts[name].sum()) - writer.rows for name, writer in writers.items()}
    if any(lost.values()) or row != len(index.keys):
        raise DataError(f"{len(index.keys)} rows in, lost {lost}", tokens, "report this as a bug")
    _write_mini_train(folder / "mini_train.parquet", chosen, index)
    return int(mini.sum())


def write_packed(
    target: Path, windows: WindowFile, index: RowIndex, row_uses: Integers, pack_tokens: int, seed: int
) -> Packed:
    """Pack the windows one after the other, each a row group. Raises DataError when a trained token got lost."""
    before = int((row_uses * index.trained_tokens.astype(np.int64)).sum())
    rows = placed = after = 0
    with row_group_writer(target, PACKED) as writer:
        for window in range(windows.uses.window_count):
            packed = pack(*windows.read(window), pack_tokens, f"{seed}/{window}")
            writer.write([packed])
            rows += packed.num_rows
            placed += len(packed.column("input_ids").flatten())
            after += int((packed.column("labels").flatten().to_numpy() != IGNORED_LABEL).sum())
    if before != after:
        raise DataError(f"{before} trained tokens before packing, {after} after", "data/tokens", "report this as a bug")
    return Packed(rows, placed / (rows * pack_tokens))


def check_lengths(index: RowIndex, pack_tokens: int) -> None:
    """Raise DataError when a training document is longer than `pack_tokens`."""
    longest = int(index.tokens[index.of_split("train")].max(initial=0))
    if longest > pack_tokens:
        raise DataError(
            f"a document has {longest} tokens, a packed row holds {pack_tokens}",
            "split.pack_tokens",
            "raise it to tokenize.max_tokens at least, then run `dvc repro`",
        )


def _first_by_key(index: RowIndex, rows: int) -> npt.NDArray[np.bool_]:
    train = np.flatnonzero(index.of_split("train"))
    chosen = np.zeros(len(index.keys), np.bool_)
    chosen[train[np.argsort(index.keys[train], kind="stable")[:rows]]] = True
    return chosen


def _where(batch: pa.RecordBatch, mask: npt.NDArray[np.bool_]) -> pa.RecordBatch:
    return batch if mask.all() else batch.filter(pa.array(mask))


def _write_mini_train(
    target: Path, chosen: list[tuple[npt.NDArray[np.int64], pa.RecordBatch]], index: RowIndex
) -> None:
    """Write the rows of these numbers in the order of their keys."""
    order = np.argsort(index.keys[np.concatenate([numbers for numbers, _ in chosen])], kind="stable")
    rows = pa.Table.from_batches([rows for _, rows in chosen]).take(order)
    with row_group_writer(target, TOKENS) as writer:
        for batch in rows.to_batches():
            writer.add(batch)


def _marked_documents(batch: pa.RecordBatch) -> pa.ListArray:
    ids, trained = batch.column("input_ids"), batch.column("trained")
    values = marked(ids.flatten().to_numpy(), trained.flatten().to_numpy(zero_copy_only=False))
    lengths = compute.list_value_length(ids).to_numpy()
    return pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), values)
