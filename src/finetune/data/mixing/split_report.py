"""The checks and the figures of a split, from the index of its rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from finetune.data.mixing.row_index import Mask, RowIndex
from finetune.data.splits import SPLITS, SplitName
from finetune.errors import DataError
from finetune.log import logger

LEFT_OUT = "left_out"
ANSWER_IN_TRAIN = "answer_in_train"
HELD_OUT: tuple[SplitName, ...] = ("validation", "test")


def check_splits(index: RowIndex) -> None:
    """Raise DataError when a split that a later stage needs is empty, or nothing in train is trained."""
    splits = {name: int(index.of_split(name).sum()) for name in SPLITS}
    left_out = {name: int(_left_out_of(index, name).sum()) for name in HELD_OUT}
    counts = ", ".join(f"{name} {rows}" for name, rows in splits.items())
    counts += "".join(
        f", {rows} of {name} left out: their answers are in train" for name, rows in left_out.items() if rows
    )
    if not splits["train"]:
        raise DataError(f"no row to train on ({counts})", "section split", "lower the shares, or add data")
    if not index.trained_tokens[index.of_split("train")].any():
        raise DataError(
            f"no token of the {splits['train']} training rows is trained", "section tokenize", "mend tokenize.loss"
        )
    if not splits["test"]:
        raise DataError(f"no row to test on ({counts})", "split.test_share", "raise split.test_share, or add data")
    if not splits["validation"]:
        raise DataError(f"no row to validate on ({counts})", "split.validation_share", "raise it, or add data")


def split_metrics(index: RowIndex) -> dict[str, Any]:
    """Per source and split, with `left_out` as a split: rows, share of the source's rows, tokens, trained tokens.

    `left_out` of the result: rows by reason, split and source.
    """
    every = np.ones(len(index.keys), np.bool_)
    of_source = {name: index.sources == number for number, name in enumerate(index.source_names)}
    reasons = {
        split: {name: int((_left_out_of(index, split) & own).sum()) for name, own in of_source.items()}
        for split in HELD_OUT
    }
    return {
        "rows": len(index.keys),
        "splits": _counts(index, every),
        "sources": {name: _counts(index, own) for name, own in of_source.items()},
        LEFT_OUT: {ANSWER_IN_TRAIN: reasons},
    }


def plot_rows(metrics: dict[str, Any]) -> list[tuple[str, str, int, int]]:
    """(source, split, rows, tokens) of the metrics of a split."""
    return [
        (source, name, counts["rows"], counts["tokens"])
        for source, by_split in metrics["sources"].items()
        for name, counts in by_split.items()
    ]


def _left_out_of(index: RowIndex, name: SplitName) -> Mask:
    in_split: Mask = index.splits == SPLITS.index(name)
    return in_split & index.left_out


def _counts(index: RowIndex, rows: Mask) -> dict[str, Any]:
    parts = {name: index.of_split(name) & rows for name in SPLITS}
    total = int(rows.sum())
    return {
        name: {
            "rows": int(part.sum()),
            "share": round(int(part.sum()) / total, 4),
            "groups": len(np.unique(index.groups[part])),
            "tokens": int(index.tokens[part].sum(dtype=np.int64)),
            "trained_tokens": int(index.trained_tokens[part].sum(dtype=np.int64)),
        }
        for name, part in [*parts.items(), (LEFT_OUT, index.left_out & rows)]
    }


def log_summary(numbers: Mapping[str, Any]) -> None:
    """One line with the figures that metrics/split.json holds."""
    logger.info(
        "rows %s, left out as their answer is in train %s, mini_train %d; mix of %d rows, %d tokens: shares %s; "
        "%d packed rows, fill %.4f, %d trained tokens",
        {name: counts["rows"] for name, counts in numbers["splits"].items()},
        {name: sum(by_source.values()) for name, by_source in numbers["left_out"]["answer_in_train"].items()},
        numbers["mini_train_rows"],
        numbers["mix"]["rows"],
        numbers["mix"]["tokens"],
        {name: counts["obtained_share"] for name, counts in numbers["mix"]["sources"].items()},
        numbers["packed"]["rows"],
        numbers["packed"]["fill"],
        numbers["mix"]["trained_tokens"],
    )
