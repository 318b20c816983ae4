from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny_bytes import byte_level_tokenizer
from training_settings import make_lora

from finetune.errors import DataError
from finetune.evaluation.group_scores import base_and_tuned, score_groups, score_rows
from finetune.evaluation.perplexity import model_logits
from finetune.io import sha256_text
from finetune.training.model import add_adapter, load_base
from finetune.training.vocabulary import Extension


def uniform(ids: list[int]) -> torch.Tensor:
    return torch.zeros(len(ids), 8)


def test_scores_are_summed_by_source_and_group() -> None:
    rows = [
        {"source": source, "group": group, "input_ids": [1, 2, 3], "trained": [False, False, True]}
        for source, group in (("b", "b/2"), ("a", "a/1"), ("b", "b/1"), ("b", "b/2"))
    ] + [{"source": "c", "group": "c/1", "input_ids": [1, 2], "trained": [True, False]}]
    scores = score_groups({"base": uniform, "tuned": uniform}, rows, len(rows), byte_level_tokenizer())
    assert list(scores) == [("a", "a/1"), ("b", "b/1"), ("b", "b/2")]
    assert [both["tuned"].tokens for both in scores.values()] == [1, 1, 2]
    assert [both["base"].text_bytes for both in scores.values()] == [1, 1, 2]
    with pytest.raises(DataError, match="no row of the test split has a trained token"):
        score_groups({"base": uniform}, rows[-1:], 1, byte_level_tokenizer())


def test_scores_for_a_later_comparison_name_the_texts_by_hash_and_no_group() -> None:
    rows = [
        {"id": name, "source": "s", "group": group, "input_ids": ids, "trained": [False, *[True] * (len(ids) - 1)]}
        for name, group, ids in (("2", "s/ann", [1, 2]), ("1", "s/ann", [1, 2, 3]), ("3", "s/bob", [1, 2]))
    ]
    scores = score_groups({"base": uniform, "tuned": uniform}, rows, len(rows), byte_level_tokenizer())
    listed = score_rows(scores, [*rows, {"id": "4", "source": "s", "group": "s/nothing trained"}])
    nats = math.log(8)
    expected = [
        ("s", "4e07408562bedb8b60ce05c1decfe3ad16b72230967de01f640b7e4729b49fce", 1, 1, nats, nats),
        ("s", sha256_text("1\n2"), 3, 3, 3 * nats, 3 * nats),
    ]
    assert [row[:4] for row in listed] == [row[:4] for row in sorted(expected)]
    assert [row[4:] for row in listed] == [pytest.approx(row[4:]) for row in sorted(expected)]
    # The order in which rows come decides nothing.
    assert score_rows(scores, rows[::-1]) == listed


def test_base_is_the_model_without_its_adapter(tiny_base: Path) -> None:
    device = torch.device("cpu")
    expected = model_logits(load_base(tiny_base, None, torch.float32, device))([1, 4, 9])
    lora = make_lora(rank=2, alpha=2, target_modules=["q_proj"])
    model = add_adapter(load_base(tiny_base, None, torch.float32, device), lora, Extension((), 0)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.5)
    both = base_and_tuned(model)
    assert torch.equal(both["base"]([1, 4, 9]), expected)
    assert not torch.allclose(both["tuned"]([1, 4, 9]), expected)
