from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_training import CPU, KEPT, packed_rows, train
from training_settings import TARGETS, make_lora, make_settings

from finetune.data.tables import PACKED, write_parquet
from finetune.errors import DataError
from finetune.io import sha256_tree
from finetune.training import loop
from finetune.training.batches import measure_rows
from finetune.training.device import make_deterministic
from finetune.training.model import add_adapter, four_bit_layers, load_base
from finetune.training.trainer import ExactTrainer


def test_loss_falls_and_every_step_is_logged(tiny_base: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    seen: list[int] = []
    _, entries = train(
        tiny_base,
        tiny_tokenizer,
        tmp_path / "run",
        tmp_path / "adapter",
        make_settings(epochs=6),
        mirror=lambda step, metrics: seen.append(step),
    )
    assert [entry["step"] for entry in entries] == list(range(1, 31)) == seen
    assert entries[-1]["train_loss"] < entries[0]["train_loss"] - 0.3
    assert [entry["step"] for entry in entries if entry["validation_loss"] == 1.5] == [5, 10, 15, 20, 25, 30]
    # 17 of 20 tokens of each of 10 rows are trained, 6 times.
    assert entries[-1]["trained_tokens"] == 10 * 17 * 6


def test_a_run_that_was_cut_ends_in_the_same_bytes(tiny_base: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    _, whole = train(tiny_base, tiny_tokenizer, tmp_path / "whole", tmp_path / "a", make_settings())

    class PowerCutError(Exception):
        pass

    def cut_at_7(step: int, metrics: dict[str, float]) -> None:
        if step == 7:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        train(tiny_base, tiny_tokenizer, tmp_path / "cut", tmp_path / "b", make_settings(), mirror=cut_at_7)
    # The newest checkpoint is torn, as by a power cut: the older good one must be used.
    torn = tmp_path / "cut" / "checkpoint-6" / "tensors-00001.safetensors"
    torn.write_bytes(torn.read_bytes()[:100])
    _, resumed = train(tiny_base, tiny_tokenizer, tmp_path / "cut", tmp_path / "b", make_settings())
    assert resumed == whole
    assert sha256_tree(tmp_path / "b") == sha256_tree(tmp_path / "a")


def test_trained_weights_stay_float32_on_four_bit_layers(tiny_base: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    use = make_settings(epochs=1)
    model = load_base(tiny_base, use.quantization, torch.float32, CPU)
    assert four_bit_layers(model) == 7
    train(tiny_base, tiny_tokenizer, tmp_path / "run", tmp_path / "adapter", use)
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert len(tensors) == 2 * len(TARGETS)


def test_rows_without_a_trained_token_are_refused(tiny_base: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{**row, "labels": [-100] * 20} for row in packed_rows()]
    model = add_adapter(load_base(tiny_base, None, torch.float32, CPU), make_settings().lora, KEPT)
    with pytest.raises(DataError, match="no token of the training rows is trained"):
        loop.train(
            model,
            tiny_tokenizer,
            Dataset.from_list(rows),
            make_settings(),
            seed=1,
            folder=tmp_path,
            validate=lambda m: 0.0,
            begin=lambda step: None,
            seen=lambda step, tokens: None,
        )


@pytest.mark.parametrize("accumulation", [1, 2])
def test_packed_documents_do_not_see_each_other(
    accumulation: int, tiny_base: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """One step through the real trainer on unequal documents, packed together or alone: the same loss."""
    first, second, third = [1, 3, 4, 5, 2], [1, 9, 10, 11, 12, 13, 2], [1, *range(3, 20), 2]
    use = make_settings(
        epochs=1,
        batch_rows=2,
        micro_batch_rows=2 // accumulation,
        lora=make_lora(),
    )
    losses = []
    for name, packs in (("packed", [[first, second], [third]]), ("alone", [[first], [second], [third]])):
        rows = [
            {
                "input_ids": [token for ids in pack for token in ids],
                "labels": [label for ids in pack for label in (-100, *ids[1:])],
                "seq_lengths": [len(ids) for ids in pack],
            }
            for pack in packs
        ]
        batch = use.model_copy(update={"batch_rows": 3, "micro_batch_rows": 3}) if name == "alone" else use
        make_deterministic(3, 1)
        model = add_adapter(load_base(tiny_base, None, torch.float32, CPU), batch.lora, KEPT)
        entries = loop.train(
            model,
            tiny_tokenizer,
            Dataset.from_list(rows),
            batch,
            seed=3,
            folder=tmp_path / name,
            validate=lambda model: 0.0,
            begin=lambda step: None,
            seen=lambda step, tokens: None,
        )
        losses.append(entries[0]["train_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_the_last_step_and_every_validation_are_logged_at_any_cadence(
    tiny_base: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    use = make_settings(log_every_steps=50, evaluate_every_steps=4)
    _, entries = train(tiny_base, tiny_tokenizer, tmp_path / "run", tmp_path / "adapter", use)
    assert [(entry["step"], entry["validation_loss"]) for entry in entries] == [(4, 1.5), (8, 1.5), (10, 1.5)]


def test_a_layer_that_a_merge_could_not_change_alone_is_refused(tiny_base: Path) -> None:
    lora = make_lora(target_modules=["q_proj", "lm_head"])
    with pytest.raises(
        DataError, match=r"no linear layer to adapt named lm_head(.|\n)*choose among: down_proj, gate_proj"
    ):
        add_adapter(load_base(tiny_base, None, torch.float32, CPU), lora, KEPT)


def test_rows_are_read_from_disk_and_give_the_same_adapter(
    tiny_base: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    write_parquet(tmp_path / "packed.parquet", packed_rows(), PACKED)
    rows = loop.open_rows(tmp_path / "packed.parquet", tmp_path / "run")
    assert list(rows) == packed_rows()
    assert rows.cache_files
    assert measure_rows(rows).trained.tolist() == [17] * 10
    train(tiny_base, tiny_tokenizer, tmp_path / "run", tmp_path / "disk", make_settings(), rows=rows)
    train(tiny_base, tiny_tokenizer, tmp_path / "other", tmp_path / "memory", make_settings())
    assert sha256_tree(tmp_path / "disk") == sha256_tree(tmp_path / "memory")


def test_a_missing_and_a_damaged_file_of_rows_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"file is missing(.|\n)*packed\.parquet(.|\n)*run `dvc repro`"):
        loop.open_rows(tmp_path / "packed.parquet", tmp_path / "run")
    (tmp_path / "packed.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"not a Parquet file: .*(.|\n)*delete the file and run `dvc repro`"):
        loop.open_rows(tmp_path / "packed.parquet", tmp_path / "run")


def test_the_trial_of_the_largest_micro_batch_changes_nothing(
    tiny_base: Path, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU it comes before the first step; here it is called by hand. Dropout draws from the generators."""
    _, plain = train(tiny_base, tiny_tokenizer, tmp_path / "p", tmp_path / "a", make_settings())
    prepare, seen = ExactTrainer._prepare_for_training, []

    def with_trial(trainer: Any, *arguments: Any, **others: Any) -> Any:
        prepared = prepare(trainer, *arguments, **others)
        trainer.confirm_memory(prepared[0])
        seen.append(trainer)
        return prepared

    monkeypatch.setattr(ExactTrainer, "_prepare_for_training", with_trial)
    _, tried = train(tiny_base, tiny_tokenizer, tmp_path / "t", tmp_path / "b", make_settings())
    assert len(seen) == 1
    assert tried == plain
    assert sha256_tree(tmp_path / "b") == sha256_tree(tmp_path / "a")
