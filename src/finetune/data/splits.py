"""A record's group -> train, validation or test, by the hash of the group's name and nothing else.

The share of one record does not depend on the others, their number or their order: new data never moves old records.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
TokenRow = dict[str, Any]


@dataclass(frozen=True)
class HeldOutShares:
    """The shares of the records that are kept from training, as section split of params.yaml has them."""

    validation_share: float
    test_share: float


def assign(group: str, validation_share: float, test_share: float) -> SplitName:
    """The split of a group; test comes first, so that changing the validation share leaves the test set alone."""
    digest = hashlib.sha256(group.encode("utf-8")).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < test_share:
        return "test"
    return "validation" if position < test_share + validation_share else "train"


def trained_tokens(row: TokenRow) -> int:
    """Tokens of a document that add to the loss: the trained ones, but never the first, which nothing predicts."""
    return sum(row["trained"][1:])
