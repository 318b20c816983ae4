"""A record's group -> train, validation or test, by the hash of the group's name and nothing else.

The share of one record does not depend on the others, their number or their order: new data never moves old records.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal

from finetune.errors import DataError
from finetune.io import sha256_text

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
LEFT_OUT = "left_out"
ANSWER_IN_TRAIN = "answer_in_train"
# A shorter answer ("Oui, bien sûr.") is said again by chance, and to know it is no proof of having seen the record.
MIN_ANSWER_TOKENS = 8
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


def answers(row: TokenRow) -> set[tuple[int, ...]]:
    """The answers of a document: its runs of trained token ids, as long as they go, of MIN_ANSWER_TOKENS at least."""
    pairs = zip(row["input_ids"], row["trained"], strict=True)
    runs = (tuple(token for token, _ in run) for trained, run in groupby(pairs, key=itemgetter(1)) if trained)
    return {run for run in runs if len(run) >= MIN_ANSWER_TOKENS}


def leave_out_answered(
    splits: Mapping[SplitName, Sequence[TokenRow]],
) -> tuple[dict[SplitName, list[TokenRow]], dict[SplitName, list[TokenRow]]]:
    """The splits without the held-out rows that share an answer with a row of train, and those rows by split.

    A model that has learned an answer by heart would be praised for it. Time and memory are linear in the tokens.
    """
    learned = {answer for row in splits["train"] for answer in answers(row)}
    kept: dict[SplitName, list[TokenRow]] = {"train": list(splits["train"]), "validation": [], "test": []}
    left_out: dict[SplitName, list[TokenRow]] = {"validation": [], "test": []}
    for name, rows in left_out.items():
        for row in splits[name]:
            (kept[name] if learned.isdisjoint(answers(row)) else rows).append(row)
    return kept, left_out


def check_splits(
    splits: Mapping[SplitName, Sequence[TokenRow]], left_out: Mapping[SplitName, Sequence[TokenRow]], rows_in: int
) -> None:
    """Raise DataError when a split that a later stage needs is empty, nothing in train is trained, or a row is lost."""
    counts = ", ".join(f"{name} {len(rows)}" for name, rows in splits.items())
    counts += "".join(
        f", {len(rows)} of {name} left out: their answers are in train" for name, rows in left_out.items()
    )
    rows_out = sum(len(rows) for part in (splits, left_out) for rows in part.values())
    if rows_out != rows_in:
        raise DataError(f"{rows_in} rows in, {rows_out} out ({counts})", "data/tokens", "report this as a bug")
    if not splits["train"]:
        raise DataError(f"no row to train on ({counts})", "section split", "lower the shares, or add data")
    if not any(trained_tokens(row) for row in splits["train"]):
        raise DataError(
            f"no token of the {len(splits['train'])} training rows is trained", "section tokenize", "mend tokenize.loss"
        )
    if not splits["test"]:
        raise DataError(f"no row to test on ({counts})", "split.test_share", "raise split.test_share, or add data")
    if not splits["validation"]:
        raise DataError(f"no row to validate on ({counts})", "split.validation_share", "raise it, or add data")


def split_metrics(
    splits: Mapping[SplitName, Sequence[TokenRow]], left_out: Mapping[SplitName, Sequence[TokenRow]]
) -> dict[str, Any]:
    """Per source and split, with `left_out` as a split: rows, share of the source's rows, tokens, trained tokens.

    `left_out` of the result: rows by reason, split and source.
    """
    parts: dict[str, Sequence[TokenRow]] = {name: rows for name, rows in splits.items()}
    parts[LEFT_OUT] = [row for rows in left_out.values() for row in rows]
    sources = sorted({row["source"] for rows in parts.values() for row in rows})
    by_source = {}
    for source in sources:
        own = {name: [row for row in rows if row["source"] == source] for name, rows in parts.items()}
        by_source[source] = _counts(own)
    reasons = {name: {source: _of_source(rows, source) for source in sources} for name, rows in left_out.items()}
    return {
        "rows": sum(len(rows) for rows in parts.values()),
        "splits": _counts(parts),
        "sources": by_source,
        LEFT_OUT: {ANSWER_IN_TRAIN: reasons},
    }


def _of_source(rows: Sequence[TokenRow], source: str) -> int:
    return sum(row["source"] == source for row in rows)


def _counts(splits: Mapping[str, Sequence[TokenRow]]) -> dict[str, Any]:
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
