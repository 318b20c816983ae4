"""The training loop on a CUDA device: 4-bit layers, falling loss, equal bytes twice."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from training_settings import make_lora, make_settings

from finetune.training import loop
from finetune.training.device import check_hardware, choose_device, make_deterministic
from finetune.training.model import add_adapter, four_bit_layers, load_base
from finetune.training.vocabulary import Extension

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run `make gpu-test` on a GPU host"),
]

SETTINGS = make_settings(
    compute_dtype="bfloat16",
    lora=make_lora(rank=8, alpha=16, target_modules=["q_proj", "down_proj"]),
    attention="auto",
    evaluate_every_steps=100,
    save_every_steps=100,
    keep_checkpoints=1,
)


def train(base: Path, tokenizer: Any, folder: Path) -> tuple[list[Any], str]:
    make_deterministic(5, 1)
    device = choose_device()
    check_hardware(SETTINGS, device)
    model = load_base(base, SETTINGS.quantization, torch.bfloat16, device)
    assert four_bit_layers(model) == 7
    model = add_adapter(model, SETTINGS.lora, Extension((), 0))
    ids = [1, *range(3, 29), 2]
    rows = Dataset.from_list([{"input_ids": ids, "labels": [-100, *ids[1:]], "seq_lengths": [28]} for _ in range(20)])
    entries = loop.train(
        model,
        tokenizer,
        rows,
        SETTINGS,
        seed=5,
        folder=folder,
        validate=lambda model: 0.0,
        begin=lambda step: None,
        seen=lambda *_: None,
    )
    weights = [p.detach().cpu().numpy().tobytes() for p in model.parameters() if p.requires_grad]
    return entries, hashlib.sha256(b"".join(weights)).hexdigest()


def test_two_runs_on_one_device_give_the_same_falling_losses_and_bytes(
    tiny_base: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    first, first_hash = train(tiny_base, tiny_tokenizer, tmp_path / "a")
    second, second_hash = train(tiny_base, tiny_tokenizer, tmp_path / "b")
    assert first[-1]["train_loss"] < first[0]["train_loss"] - 0.2
    assert first == second
    assert first_hash == second_hash
