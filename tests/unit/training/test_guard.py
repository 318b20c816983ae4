"""How many steps in a row may be skipped: fewer than a float16 run takes to find its scale."""

from __future__ import annotations

import pytest
import torch

from finetune.errors import NotFiniteError
from finetune.training.batches import Windows
from finetune.training.guard import FiniteGuard


def guard_after(steps: int, *, scaled: bool) -> FiniteGuard:
    guard = FiniteGuard(Windows(rows=4, batch_rows=2, seed=0), max_skipped_steps=3)
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], fused=True)
    for step in range(1, steps + 1):
        guard.watch(step, torch.tensor(float("inf")), optimizer, scaled=scaled)
    return guard


def test_a_fourth_step_in_a_row_is_one_too_many() -> None:
    assert guard_after(3, scaled=False).check() == [1, 2, 3]
    with pytest.raises(NotFiniteError, match=r"4 steps in a row had no finite gradient, the last is step 4 \(rows \d"):
        guard_after(4, scaled=False).check()


def test_a_gradient_scaler_may_search_for_its_scale() -> None:
    assert len(guard_after(19, scaled=True).check()) == 19
    with pytest.raises(NotFiniteError, match="20 steps in a row"):
        guard_after(20, scaled=True).check()


def test_steps_between_good_ones_are_counted_and_end_nothing() -> None:
    guard = FiniteGuard(Windows(rows=4, batch_rows=2, seed=0), max_skipped_steps=1)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    for step, norm in enumerate((1.0, float("nan"), 2.0, float("nan"), 3.0), 1):
        guard.watch(step, norm, optimizer, scaled=False)
    assert guard.check() == [2, 4]
    assert guard.skipped == [2, 4]
    assert guard.check() == []
