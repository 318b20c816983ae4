"""Rows and one training run at the scale of the tiny base models of conftest.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from finetune.training import loop
from finetune.training.device import make_deterministic
from finetune.training.model import add_adapter, load_extended, save_adapter
from finetune.training.vocabulary import Extension
from finetune.training_sections import TrainQlora

CPU = torch.device("cpu")
KEPT = Extension((), 0)


def packed_rows() -> list[dict[str, Any]]:
    """Ten rows of two documents each, ids 3 to 19 between BOS and EOS."""
    rows = []
    for row in range(10):
        ids = [1, *((3 + (row + at) % 26) for at in range(8)), 2] * 2
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:10], -100, *ids[11:]], "seq_lengths": [10, 10]})
    return rows


def train(
    base: Path,
    tokenizer: Any,
    folder: Path,
    target: Path,
    use: TrainQlora,
    *,
    rows: Dataset | None = None,
    extension: Extension = KEPT,
    mirror: Any = None,
    validate: Any = None,
) -> tuple[Any, list[Any]]:
    """Train an adapter and save it in `target`; returns the model and the log."""
    make_deterministic(3, 1)
    base_model = load_extended(base, extension, use.quantization, torch.float32, CPU)
    model = add_adapter(base_model, use.lora, extension)
    entries = loop.train(
        model,
        tokenizer,
        Dataset.from_list(packed_rows()) if rows is None else rows,
        use,
        seed=3,
        folder=folder,
        validate=validate or (lambda model: 1.5),
        begin=lambda step: None,
        seen=mirror or (lambda step, tokens: None),
    )
    save_adapter(model, target)
    return model, entries
