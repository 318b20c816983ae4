from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.errors import DataError
from finetune.io import sha256_tree
from finetune.sections import Lora, Quantization, TrainQlora
from finetune.training import loop
from finetune.training.device import make_deterministic
from finetune.training.model import add_adapter, four_bit_layers, load_base, save_adapter

CPU = torch.device("cpu")
TARGETS = ["v_proj", "q_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]


def settings(**changes: Any) -> TrainQlora:
    return TrainQlora(
        **{
            "quantization": Quantization(format="nf4", double_quantization=True),
            "compute_dtype": "float32",
            "lora": Lora(rank=4, alpha=8, dropout=0.1, use_dora=False, use_rslora=False, target_modules=TARGETS),
            "epochs": 2,
            "micro_batch_rows": 2,
            "gradient_accumulation_steps": 1,
            "learning_rate": 0.03,
            "scheduler": "cosine",
            "warmup_share": 0.1,
            "weight_decay": 0.0,
            "max_gradient_norm": 1.0,
            "optimizer": "adamw_torch_fused",
            "gradient_checkpointing": False,
            "log_every_steps": 1,
            "evaluate_every_steps": 5,
            "save_every_steps": 2,
            "keep_checkpoints": 2,
            **changes,
        }
    )


def packed_rows(count: int = 10) -> list[dict[str, Any]]:
    rows = []
    for row in range(count):
        ids = [1, *((3 + (row + at) % 26) for at in range(8)), 2] * 2
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:10], -100, *ids[11:]], "seq_lengths": [10, 10]})
    return rows


def train(base: Path, tokenizer: Any, folder: Path, target: Path, use: TrainQlora, mirror: Any = None) -> list[Any]:
    make_deterministic(3, 1)
    model = add_adapter(load_base(base, use.quantization, torch.float32, CPU), use.lora)
    entries = loop.train(
        model,
        tokenizer,
        packed_rows(),
        use,
        seed=3,
        folder=folder,
        validate=lambda model: 1.5,
        mirror=mirror or (lambda step, metrics: None),
    )
    save_adapter(model, target)
    return entries


def test_loss_falls_and_every_step_is_logged(tiny_base: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    seen: list[int] = []
    entries = train(
        tiny_base,
        tiny_tokenizer,
        tmp_path / "run",
        tmp_path / "adapter",
        settings(epochs=6),
        mirror=lambda step, metrics: seen.append(step),
    )
    assert [entry["step"] for entry in entries] == list(range(1, 31)) == seen
    assert entries[-1]["train_loss"] < entries[0]["train_loss"] - 0.3
    assert [entry["step"] for entry in entries if entry["validation_loss"] == 1.5] == [5, 10, 15, 20, 25, 30]
    # 17 of 20 tokens of each of 10 rows are trained, 6 times.
    assert entries[-1]["trained_tokens"] == 10 * 17 * 6


def test_a_run_that_was_cut_ends_in_the_same_bytes(tiny_base: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    whole = train(tiny_base, tiny_tokenizer, tmp_path / "whole", tmp_path / "a", settings())

    class PowerCutError(Exception):
        pass

    def cut_at_7(step: int, metrics: dict[str, float]) -> None:
        if step == 7:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        train(tiny_base, tiny_tokenizer, tmp_path / "cut", tmp_path / "b", settings(), mirror=cut_at_7)
    # The newest checkpoint is torn, as by a power cut: the older good one must be used.
    torn = tmp_path / "cut" / "checkpoint-6" / "optimizer.pt"
    torn.write_bytes(torn.read_bytes()[:100])
    resumed = train(tiny_base, tiny_tokenizer, tmp_path / "cut", tmp_path / "b", settings())
    assert resumed == whole
    assert sha256_tree(tmp_path / "b") == sha256_tree(tmp_path / "a")


def test_trained_weights_stay_float32_on_four_bit_layers(tiny_base: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    use = settings(epochs=1)
    model = load_base(tiny_base, use.quantization, torch.float32, CPU)
    assert four_bit_layers(model) == 7
    train(tiny_base, tiny_tokenizer, tmp_path / "run", tmp_path / "adapter", use)
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert len(tensors) == 2 * len(TARGETS)


def test_rows_without_a_trained_token_are_refused(tiny_base: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{**row, "labels": [-100] * 20} for row in packed_rows()]
    model = add_adapter(load_base(tiny_base, None, torch.float32, CPU), settings().lora)
    with pytest.raises(DataError, match="no token of the training rows is trained"):
        loop.train(
            model,
            tiny_tokenizer,
            rows,
            settings(),
            seed=1,
            folder=tmp_path,
            validate=lambda m: 0.0,
            mirror=lambda step, metrics: None,
        )


def test_packed_documents_do_not_see_each_other(tiny_base: Path, tiny_tokenizer: Any) -> None:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    model = load_base(tiny_base, None, torch.float32, CPU).eval()
    first, second = [1, 3, 4, 5, 2], [1, 9, 10, 11, 12, 2]
    row = {"input_ids": first + second, "labels": first + second, "seq_lengths": [5, 6]}
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([row])
    with torch.inference_mode():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0, 5:]
        alone = model(input_ids=torch.tensor([second])).logits[0]
    assert float((packed - alone).abs().max()) < 1e-5
    with torch.inference_mode():
        mixed = model(input_ids=torch.tensor([first + second])).logits[0, 5:]
    assert float((mixed - alone).abs().max()) > 1e-3
