"""One training run with any method at the scale of the tiny base models, from base to the folder that stages read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tiny_training import CPU, KEPT, packed_rows

from finetune.training import loop
from finetune.training.device import make_deterministic
from finetune.training.method import load_trained, loading_dtype, make_trainable, save_trained
from finetune.training.model import load_extended
from finetune.training.trained_on import describe, read_trained_on
from finetune.training.vocabulary import Extension
from finetune.training_sections import TrainQlora

# Row 5 stands for a reserved token of the base, 29 and 30 lie behind its last row (28).
EXTENSION = Extension((5, 29, 30), 31)
PROBE = torch.tensor([[1, 5, 6, 11, 7, 25, 9, 2]])
PROBE_OF_NEW = torch.tensor([[1, 5, 6, 29, 7, 30, 9, 2]])


def rows_with(new_ids: tuple[int, ...]) -> Dataset:
    """Ten rows of two documents; each has the new tokens between others."""
    packed = []
    for row in range(10):
        ids = [1, *(token for at, new in enumerate(new_ids) for token in (6 + (row + at) % 20, new)), 7, 2]
        packed.append({"input_ids": ids * 2, "labels": [-100, *ids[1:]] * 2, "seq_lengths": [len(ids)] * 2})
    return Dataset.from_list(packed)


def train_and_save(
    base: Path,
    tokenizer: Any,
    folder: Path,
    use: TrainQlora,
    extension: Extension = KEPT,
    rows: Any = None,
    seen: Any = None,
) -> Any:
    """Train as the stage does, save in `folder / "trained"`, and return the model that was trained."""
    make_deterministic(3, 1)
    model = load_extended(base, extension, use.quantization, loading_dtype(use), CPU)
    trained_on = describe(base, model)
    model = make_trainable(model, use, extension)
    if rows is None:
        rows = rows_with(extension.ids) if extension.ids else Dataset.from_list(packed_rows())
    loop.train(
        model,
        tokenizer,
        rows,
        use,
        seed=3,
        folder=folder / "run",
        validate=lambda model: 1.5,
        begin=lambda step: None,
        seen=seen or (lambda step, tokens: None),
    )
    save_trained(model, trained_on, folder / "trained")
    return model


def reload_trained(base: Path, folder: Path, extension: Extension = KEPT) -> Any:
    """What stages load of it, in float32, the frozen base in 4 bit where it was."""
    trained = folder / "trained"
    return load_trained(base, trained, extension, read_trained_on(trained, base), torch.float32, CPU)


def logits(model: Any, probe: torch.Tensor = PROBE) -> torch.Tensor:
    """Logits [1, tokens, vocabulary] of a text, without dropout."""
    with torch.inference_mode():
        return model.eval()(probe).logits
