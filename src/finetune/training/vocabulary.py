"""models/tokenizer/extension.json -> the rows of a base's embedding tables that are made anew and trained.

An extended vocabulary takes rows in three ways: behind the base's last row, in its padding, and in place of a reserved
token. All three start from the same row. Beside an adapter only they are trained, unless their table is trained whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer

from finetune.errors import DataError
from finetune.io import read_json

EXTENSION_FILE = "extension.json"
ROWS_PER_SUM = 4096
START = "new_rows_at_start"


@dataclass(frozen=True)
class Extension:
    """Token ids whose rows are trained, ascending, and how many rows the tables need; none and 0: the base's own."""

    ids: tuple[int, ...]
    rows: int


def read_extension(tokenizer: Path) -> Extension:
    """What the tokenizer stage says of a vocabulary; without its file the base's own is kept."""
    path = tokenizer / EXTENSION_FILE
    if not path.is_file():
        return Extension((), 0)
    content = read_json(path)
    ids, rows = tuple(sorted(content["trained_rows"].values())), content["rows_after"]
    if not ids or len(set(ids)) < len(ids) or ids[0] < 0 or ids[-1] >= rows:
        raise DataError(
            f"the trained rows must be distinct ids below {rows}, got {list(ids)}", path, "dvc repro --force tokenizer"
        )
    return Extension(ids, rows)


def table_names(model: Any) -> list[str]:
    """Names of the module that holds the input rows, and of the one that holds the output rows where it is another."""
    tables = [model.get_input_embeddings()]
    if model.get_output_embeddings().weight is not tables[0].weight:
        tables.append(model.get_output_embeddings())
    return [next(name for name, module in model.named_modules() if module is table) for table in tables]


def extend_vocabulary(model: Any, extension: Extension) -> None:
    """Grow the embedding tables of `model` to `extension.rows` and set every trained row to its start, in place.

    A table that is larger already (padded to a multiple) keeps its size. Raises DataError for a row that nothing would
    fill, and for an output layer with a bias: peft 0.21 leaves it out where it trains single rows.
    """
    if not extension.ids:
        return
    held = model.get_input_embeddings().weight.shape[0]
    if unfilled := sorted(set(range(held, extension.rows)) - set(extension.ids)):
        raise DataError(
            f"the base has {held} embedding rows, and no trained token fills row {unfilled[0]} "
            f"({len(unfilled)} of {extension.rows - held} new rows are empty)",
            EXTENSION_FILE,
            "choose a base whose tokenizer has no more tokens than the model has rows, or take its reserved tokens",
        )
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise DataError(
            "the base's output layer has a bias, and its rows cannot be trained alone",
            "tokenizer.tokens",
            "use strategy keep, or leave the tokens as plain text (place: text)",
        )
    if extension.rows > held:
        model.resize_token_embeddings(extension.rows, mean_resizing=False)
    for name in table_names(model):
        weight = model.get_submodule(name).weight.data
        weight[list(extension.ids)] = starting_row(weight[:held], extension.ids).to(weight)


def starting_row(weight: torch.Tensor, ids: tuple[int, ...]) -> torch.Tensor:
    """The mean of a table's other rows [width], rounded to bfloat16: weight [rows, width], `ids` may lie outside.

    At the mean a new token is neither likelier nor rarer than an average one:
    https://nlp.stanford.edu/~johnhew/vocab-expansion.html. A reserved token starts there too, whatever its row holds:
    the base never trained it, some bases leave it at zero, and its new name gives it a new meaning. The rounding makes
    the start the same in any dtype. Summed in float64, some rows at a time: the whole would be four times as large.
    """
    own = [row for row in ids if row < len(weight)]
    total = -weight[own].double().sum(dim=0)
    for part in torch.split(weight, ROWS_PER_SUM):
        total += part.double().sum(dim=0)
    return (total / (len(weight) - len(own))).to(torch.bfloat16)


def remember_start(model: Any, extension: Extension, tables: Iterable[str]) -> None:
    """Note beside each of these tables, which are about to be trained whole, how the rows of new tokens start."""
    for name in tables if extension.ids else ():
        table = model.get_submodule(name)
        rows = list(extension.ids)
        # A copy where the table is: the model may be one without values, on the device meta.
        setattr(table, START, (rows, table.weight.detach()[rows]))


def unmoved_tokens(model: Any) -> int:
    """How many new tokens have a row that still holds its starting values: no training row has such a token.

    Raises DataError when no row of any of them moved.
    """
    moved = [rows.any(dim=1).tolist() for rows in _moved_values(model)]
    if moved and not any(map(any, moved)):
        raise DataError(
            f"not one row of the {len(moved[0])} new tokens moved in training",
            "train_qlora",
            "raise train_qlora.learning_rate or the number of steps",
        )
    return sum(not all(rows) for rows in zip(*moved, strict=True))


def _moved_values(model: Any) -> Iterator[torch.Tensor]:
    """For each table, which values [new tokens, width] are no longer those of the start."""
    for module in model.modules():
        if isinstance(module, TrainableTokensLayer) and not module.tied_adapter:
            yield module.trainable_tokens_delta["default"].cpu() != module.trainable_tokens_original["default"].cpu()
        # PEFT trains a copy of the table, and keeps the table itself with the same note.
        elif START in vars(module) and module.weight.requires_grad:
            rows, start = vars(module)[START]
            yield module.weight.detach()[rows].cpu().float() != start.cpu().float()
