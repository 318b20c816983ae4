from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny_bytes import byte_level_tokenizer
from tokenizers import Tokenizer, decoders, models

from finetune.evaluation.perplexity import (
    Score,
    compare,
    mean_loss,
    model_logits,
    score,
    special_ids,
    trained_text_bytes,
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


def test_bits_per_byte_are_nats_over_ln_2_and_bytes() -> None:
    # 8 choices for each of 2 tokens are 6 bits; their text has 4 bytes.
    figures = score(uniform([1, 2, 3]), [1, 2, 3], [False, True, True], 4).summary()
    assert figures["bits_per_byte"] == pytest.approx(1.5, rel=1e-6)
    assert figures["bytes"] == 4
    assert "bits_per_byte" not in score(uniform([1, 2]), [1, 2], [False, True]).summary()


def counted(tokenizer: Tokenizer, text: str, trained: list[bool] | None = None) -> int:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return trained_text_bytes(tokenizer, special_ids(tokenizer), ids, trained or [True] * len(ids))


def test_bytes_are_those_of_the_text_behind_the_first_token_without_special_ones() -> None:
    tokenizer = byte_level_tokenizer()
    # é has two bytes, the space one; BOS comes first and is never predicted, EOS is predicted and has no text.
    assert counted(tokenizer, "<s>été là</s>") == 9
    assert counted(tokenizer, "abc") == 2
    # Two runs: "b" and "de".
    assert counted(tokenizer, "abcdef", [False, True, False, True, True, False]) == 3
    assert counted(tokenizer, "abc", [True, False, False]) == 0


def test_bytes_hold_the_space_that_a_decoder_drops_at_a_start() -> None:
    tokenizer = Tokenizer(models.WordLevel({"▁le": 0, "▁vélo": 1, "<s>": 2}, unk_token="<s>"))
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    special = {2: "<s>"}
    assert tokenizer.decode([0, 1]) == "le vélo"
    assert trained_text_bytes(tokenizer, special, [0, 1], [False, True]) == len(" vélo".encode())


def test_divergence_is_zero_for_equal_logits_and_known_for_others() -> None:
    ids, trained = [0, 1], [False, True]
    reference = torch.tensor([[math.log(0.75), math.log(0.25)], [0.0, 0.0]])
    other = torch.tensor([[math.log(0.25), math.log(0.75)], [0.0, 0.0]])
    assert compare(reference, reference, ids, trained).summary() == {"mean_kl": 0.0, "top1_agreement": 1.0}
    against = compare(reference, other, ids, trained).summary()
    assert against["mean_kl"] == pytest.approx(0.75 * math.log(3) + 0.25 * math.log(1 / 3), rel=1e-6)
    assert against["top1_agreement"] == 0.0


def test_formula_equals_the_models_own_loss(tiny_base: Path) -> None:
    model = load_base(tiny_base, None, torch.float32, torch.device("cpu")).eval()
    ids = [1, 4, 9, 12, 3, 2]
    own = model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    row = {"input_ids": ids, "trained": [True] * 6, "source": "a"}
    assert mean_loss(model, [row]) == pytest.approx(own, rel=1e-6)
    assert score(model_logits(model)(ids), ids, [True] * 6).nats / 5 == pytest.approx(own, rel=1e-6)
