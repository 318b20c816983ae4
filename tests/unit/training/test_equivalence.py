"""One result, however the work is cut; on the real trainer, in float32, with steps of up to 0.03 a weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny_training import train
from training_settings import make_lora, make_settings

from finetune.training.trainer import ExactTrainer

DOCUMENTS = [[1, *range(3, 3 + length), 2] for length in (3, 9, 4, 15, 7, 2, 11, 6, 13, 5)]


def rows_of(packs: list[list[list[int]]]) -> Dataset:
    """Packed rows: the first half of each document is not trained."""
    return Dataset.from_list(
        [
            {
                "input_ids": [token for ids in pack for token in ids],
                "labels": [label for ids in pack for label in [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]],
                "seq_lengths": [len(ids) for ids in pack],
            }
            for pack in packs
        ]
    )


def weights(base: Path, words: Any, folder: Path, rows: Dataset, **changes: Any) -> dict[str, torch.Tensor]:
    use = make_settings(lora=make_lora(), epochs=2, save_every_steps=100, **changes)
    _, entries = train(base, words, folder / "run", folder / "adapter", use, rows=rows)
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    return {**tensors, "losses": torch.tensor([float(entry["train_loss"]) for entry in entries])}


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=tolerance)


def test_a_batch_of_4_is_4_accumulated_batches_of_1(tiny_base: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Ten rows of unequal lengths: the last window of an epoch has two rows."""
    rows = rows_of([[ids] for ids in DOCUMENTS])
    whole = weights(tiny_base, tiny_tokenizer, tmp_path / "4", rows, batch_rows=4, micro_batch_rows=4)
    assert len(whole["losses"]) == 6
    for micro in (1, 2):
        cut = weights(tiny_base, tiny_tokenizer, tmp_path / str(micro), rows, batch_rows=4, micro_batch_rows=micro)
        assert_close(whole, cut, 1e-5)


def test_packed_documents_train_as_they_do_alone(tiny_base: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """All documents in one step, packed by two or alone: the same gradients, so the same weights."""
    alone = rows_of([[ids] for ids in DOCUMENTS])
    packed = rows_of([DOCUMENTS[at : at + 2] for at in range(0, 10, 2)])
    one = weights(tiny_base, tiny_tokenizer, tmp_path / "a", alone, batch_rows=10, micro_batch_rows=10)
    other = weights(tiny_base, tiny_tokenizer, tmp_path / "p", packed, batch_rows=5, micro_batch_rows=5)
    assert_close(one, other, 1e-5)


@pytest.mark.parametrize("checkpointing", ["full", "selective"])
def test_gradient_checkpointing_changes_no_weight(
    checkpointing: str, tiny_base: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    rows = rows_of([[ids] for ids in DOCUMENTS])
    plain = weights(tiny_base, tiny_tokenizer, tmp_path / "none", rows)
    again = weights(tiny_base, tiny_tokenizer, tmp_path / "again", rows, gradient_checkpointing=checkpointing)
    assert_close(plain, again, 0)


def test_a_window_that_runs_out_of_memory_gives_the_same_weights_in_parts(
    tiny_base: Path, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Memory runs out in the second micro-batch of a window, after half of its backward pass."""
    rows = rows_of([DOCUMENTS[at : at + 2] for at in range(0, 10, 2)])
    whole = weights(tiny_base, tiny_tokenizer, tmp_path / "whole", rows, batch_rows=4, micro_batch_rows=2)
    calls: list[int] = []
    compute = ExactTrainer.compute_loss

    def small_memory(trainer: Any, model: Any, inputs: Any, **others: Any) -> Any:
        loss = compute(trainer, model, inputs, **others)
        calls.append(inputs["input_ids"].shape[1])
        if len(calls) > 1 and inputs["input_ids"].shape[1] > 32:
            loss.backward(retain_graph=True)
            raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
        return loss

    monkeypatch.setattr(ExactTrainer, "compute_loss", small_memory)
    parts = weights(tiny_base, tiny_tokenizer, tmp_path / "parts", rows, batch_rows=4, micro_batch_rows=2)
    assert max(calls) > 32
    assert_close(whole, parts, 1e-5)
