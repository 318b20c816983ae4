"""The mix of the training sources, as params.yaml states it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from finetune.sections import Name, Positive, Section

HeldOutShare = Annotated[float, Field(gt=0, lt=1)]
SHARE_TOLERANCE = 1e-6


class Mix(Section):
    """How much of the training rows each source gives: `shares` of the whole, in rows or in tokens.

    `total`: size of the mix in that unit; null takes the largest that the policy allows. When a source has too little,
    `stop` shrinks the mix so that shares hold without repeats; `repeat` repeats its rows, `max_repeats` times at most,
    then shrinks, and ends where every source has been used up once; `renormalise` takes all it has and shares the rest
    among the others. A `total` that this cannot give is an error which says what can be had. `max_repeats` is 1 but for
    `repeat`.
    """

    unit: Literal["rows", "tokens"]
    shares: Annotated[dict[Name, HeldOutShare | Literal[1]], Field(min_length=1)]
    total: Positive | None
    on_exhausted: Literal["stop", "repeat", "renormalise"]
    max_repeats: Positive

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        shares_sum_to_one("shares", self.shares)
        if self.max_repeats > 1 and self.on_exhausted != "repeat":
            raise ValueError(f"max_repeats ({self.max_repeats}) must be 1 unless on_exhausted is repeat")
        return self


def shares_sum_to_one(key: str, shares: Mapping[str, float]) -> None:
    """Raise ValueError unless the shares add up to 1."""
    total = sum(shares.values())
    if abs(total - 1) > SHARE_TOLERANCE:
        raise ValueError(f"{key} must add up to 1, they add up to {total:.6g}")
