from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from finetune.evaluation import divergence as module
from finetune.evaluation.divergence import divergence


def constant(*probabilities: float) -> Callable[[list[int]], torch.Tensor]:
    """A model that gives every next token the same probabilities."""
    return lambda ids: torch.tensor(probabilities).log().expand(len(ids), -1)


def row(trained: list[bool]) -> dict[str, Any]:
    return {"input_ids": [0] * len(trained), "trained": trained}


def test_the_divergence_of_known_distributions() -> None:
    figures = divergence(constant(0.5, 0.5), constant(0.75, 0.25), [row([False, True, True])], "test")
    # 0.5 ln(0.5 / 0.75) + 0.5 ln(0.5 / 0.25) = ln(4 / 3) / 2
    assert figures["mean_kl"] == pytest.approx(math.log(4 / 3) / 2, abs=1e-6)
    # The other way round it is another number.
    turned = divergence(constant(0.75, 0.25), constant(0.5, 0.5), [row([False, True])], "test")
    assert turned["mean_kl"] == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-6)


def test_first_choices_are_counted_over_trained_tokens() -> None:
    def other(ids: list[int]) -> torch.Tensor:
        return torch.tensor([[9.0, 0.0], [0.0, 9.0], [9.0, 0.0], [9.0, 0.0]])[: len(ids)]

    rows = [row([True, True, True, False]), row([False, True, False])]
    # Position 0 predicts token 1 in both rows, position 1 token 2 in the first.
    assert divergence(constant(0.6, 0.4), other, rows, "test")["top1_agreement"] == 2 / 3


def test_windows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 11, 7, dtype=torch.float64).float()
    rows = [row([True, False, True, True, False, True, True, False, False, True, True])]
    models = [lambda ids, each=each: each for each in logits]
    whole = divergence(models[0], models[1], rows, "test")
    for size in (1, 2, 3, 10):
        monkeypatch.setattr(module, "WINDOW_TOKENS", size)
        figures = divergence(models[0], models[1], rows, "test")
        assert figures["mean_kl"] == pytest.approx(whole["mean_kl"], abs=1e-12)
        assert figures["top1_agreement"] == whole["top1_agreement"]
