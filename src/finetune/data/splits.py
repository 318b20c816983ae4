"""A record's group -> train, validation or test, by the hash of the group's name and nothing else.

The share of one record does not depend on the others, their number or their order: new data never moves old records.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from finetune.errors import DataError
from finetune.io import sha256_text

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
TokenRow = dict[str, Any]


def assign(group: str, validation_share: float, test_share: float) -> SplitName:
    """The split of a group; test comes first, so that changing the validation share leaves the test set alone."""
    digest = hashlib.sha256(group.encode("utf-8")).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < test_share:
        return "test"
    return "validation" if position < test_share + validation_share else "train"


def split_rows(rows: Iterable[TokenRow], validation_share: float, test_share: float) -> dict[SplitName, list[TokenRow]]:
    """The rows of each split, in the order given."""
    splits: dict[SplitName, list[TokenRow]] = {name: [] for name in SPLITS}
    for row in rows:
        splits[assign(row["group"], validation_share, test_share)].append(row)
    return splits


def mini_train(train: Sequence[TokenRow], rows: int) -> list[TokenRow]:
    """The first `rows` training rows by the hash of their id: a sample that stays when data is added."""
    return sorted(train, key=lambda row: sha256_text(row["id"]))[:rows]


def trained_tokens(row: TokenRow) -> int:
    """Tokens of a document that add to the loss: the trained ones, but never the first, which nothing predicts."""
    return sum(row["trained"][1:])


def check_splits(splits: dict[SplitName, list[TokenRow]]) -> None:
    """Raise DataError when a split that a later stage needs is empty, or nothing in train is trained."""
    counts = ", ".join(f"{name} {len(rows)}" for name, rows in splits.items())
    if not splits["train"]:
        raise DataError(f"no row to train on ({counts})", "section split", "lower the shares, or add data")
    if not any(trained_tokens(row) for row in splits["train"]):
        raise DataError(
            f"no token of the {len(splits['train'])} training rows is trained", "section tokenize", "mend tokenize.loss"
        )
    if not splits["test"]:
        raise DataError(f"no row to test on ({counts})", "split.test_share", "raise split.test_share, or add data")
    if not splits["validation"]:
        raise DataError(
            f"no row to validate on ({counts})", "split.validation_share", "raise it, or add data"
        )


def split_metrics(splits: dict[SplitName, list[TokenRow]]) -> dict[str, Any]:
    """Per source and split: rows, share of the source's rows, tokens and trained tokens."""
    sources = sorted({row["source"] for rows in splits.values() for row in rows})
    by_source = {}
    for source in sources:
        own = {name: [row for row in rows if row["source"] == source] for name, rows in splits.items()}
        by_source[source] = _counts(own)
    return {"splits": _counts(splits), "sources": by_source}


def _counts(splits: Any) -> dict[str, Any]:
    total = sum(len(rows) for rows in splits.values())
    return {
        name: {
            "rows": len(rows),
            "share": round(len(rows) / total, 4),
            "groups": len({row["group"] for row in rows}),
            "tokens": sum(len(row["input_ids"]) for row in rows),
            "trained_tokens": sum(trained_tokens(row) for row in rows),
        }
        for name, rows in splits.items()
    }
