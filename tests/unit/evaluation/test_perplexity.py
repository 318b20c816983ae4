from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from finetune.evaluation.perplexity import (
    Score,
    compare,
    mean_loss,
    measure_beside,
    model_logits,
    score,
    score_by_source,
)
from finetune.training.model import load_base


def uniform(ids: list[int]) -> torch.Tensor:
    return torch.zeros(len(ids), 8)


def test_uniform_logits_give_the_vocabulary_as_perplexity() -> None:
    assert score(uniform([1, 2, 3]), [1, 2, 3], [False, True, True]).summary()["perplexity"] == pytest.approx(8.0)


def test_only_trained_tokens_count_and_the_first_is_never_predicted() -> None:
    assert score(uniform([1, 2, 3, 4]), [1, 2, 3, 4], [True, False, True, False]).tokens == 1


def test_perplexity_is_weighted_by_tokens_not_by_rows() -> None:
    # exp of the mean over 4 tokens, not the mean of two rows' perplexities (which would be 5.5).
    total = Score(nats=3 * math.log(10), tokens=3, correct=0) + Score(nats=math.log(1), tokens=1, correct=1)
    assert total.summary() == {"perplexity": pytest.approx(10 ** (3 / 4)), "token_accuracy": 0.25, "tokens": 4}


def test_scores_are_summed_by_source() -> None:
    rows = [
        {"source": source, "input_ids": [1, 2, 3], "trained": [False, False, True]} for source in ("b", "a", "b")
    ] + [{"source": "c", "input_ids": [1, 2], "trained": [False, False]}]
    scores = score_by_source(uniform, rows, "test")
    assert list(scores) == ["a", "b"]
    assert [scores["a"].tokens, scores["b"].tokens] == [1, 2]


def test_divergence_is_zero_for_equal_logits_and_known_for_others() -> None:
    ids, trained = [0, 1], [False, True]
    reference = torch.tensor([[math.log(0.75), math.log(0.25)], [0.0, 0.0]])
    other = torch.tensor([[math.log(0.25), math.log(0.75)], [0.0, 0.0]])
    assert compare(reference, reference, ids, trained).summary() == {"mean_kl": 0.0, "top1_agreement": 1.0}
    against = compare(reference, other, ids, trained).summary()
    assert against["mean_kl"] == pytest.approx(0.75 * math.log(3) + 0.25 * math.log(1 / 3), rel=1e-6)
    assert against["top1_agreement"] == 0.0
    rows = [{"input_ids": ids, "trained": trained}] * 2
    whole, measured = measure_beside(lambda _: reference, {"other": lambda _: other}, rows, "test")
    assert whole["perplexity"] == pytest.approx(1 / 0.25, rel=1e-6)
    assert measured["other"]["perplexity"] == pytest.approx(1 / 0.75, rel=1e-6)
    assert measured["other"]["mean_kl"] == pytest.approx(against["mean_kl"], rel=1e-6)


def test_formula_equals_the_models_own_loss(tiny_base: Path) -> None:
    model = load_base(tiny_base, None, torch.float32, torch.device("cpu")).eval()
    ids = [1, 4, 9, 12, 3, 2]
    own = model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    row = {"input_ids": ids, "trained": [True] * 6, "source": "a"}
    assert mean_loss(model, [row]) == pytest.approx(own, rel=1e-6)
    assert score(model_logits(model)(ids), ids, [True] * 6).nats / 5 == pytest.approx(own, rel=1e-6)
