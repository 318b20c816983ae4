"""Every kind of adapter as PEFT saves it: merged, saved, reloaded, its logits beside base + adapter."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finetune.errors import ExportError
from finetune.export import weights
from finetune.export.merge import merge_shards, reload
from finetune.io import read_json, sha256_tree, write_json

PROBE = torch.tensor([[1, 5, 6, 7, 8, 9, 2, 28, 3]])
# What float32 sums in another order may differ by, of logits up to about 3.
FLOAT32_BOUND = 1e-5
# bfloat16 keeps 8 bits of each merged value.
BFLOAT16_BOUND = 0.02
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


def make_adapter(base: Path, folder: Path, scale: float = 0.2, **options: Any) -> Path:
    """An adapter whose trained values are all moved, as PEFT itself saves it; some of the tables are warned of."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.name_or_path = ""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.data += scale * torch.randn_like(parameter)
        adapted.save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(PROBE).logits


def adapted_logits(base: Path, adapter: Path) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return logits(PeftModel.from_pretrained(plain, str(adapter)))


def difference(base: Path, adapter: Path, merged: Path) -> float:
    return float((logits(reload(merged, torch.float32)) - adapted_logits(base, adapter)).abs().max())


def merged_by(base: Path, adapter: Path, target: Path, dtype: str = "float32") -> dict[str, int]:
    return merge_shards(base, adapter, target, dtype, [])


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True, "use_rslora": True},
        {"target_modules": "all-linear", "r": 7},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.mlp.down_proj": 40, "q_proj": 3}},
        {"rank_pattern": {r".*\.q_proj": 9}, "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 1}, "use_rslora": 1},
    ],
    ids=["dora-rslora", "all-linear", "patterns", "regular-expressions"],
)
@pytest.mark.parametrize("which", ["tiny_base", "untied_base"])
def test_low_rank_updates(which: str, options: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest) -> None:
    base = request.getfixturevalue(which)
    adapter = make_adapter(base, tmp_path / "adapter", **options)
    merged_by(base, adapter, tmp_path / "whole")
    assert difference(base, adapter, tmp_path / "whole") < FLOAT32_BOUND
    merged_by(base, adapter, tmp_path / "half", "bfloat16")
    assert difference(base, adapter, tmp_path / "half") < BFLOAT16_BOUND
    plain = logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    assert float((plain - adapted_logits(base, adapter)).abs().max()) > 0.08


def test_another_scale_than_the_adapters_is_found(tiny_base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "adapter", alpha_pattern={"q_proj": 80})
    config = read_json(adapter / "adapter_config.json")
    shutil.copytree(adapter, tmp_path / "other")
    write_json(tmp_path / "other/adapter_config.json", {**config, "alpha_pattern": {}})
    merged_by(tiny_base, tmp_path / "other", tmp_path / "merged")
    assert difference(tiny_base, adapter, tmp_path / "merged") > 1e-3


# By modules_to_save: whether a tied model stays so, and how many tensors an untied base's merge changes. `norm` ends
# the names of all three norms, and PEFT saves each.
SAVED = {
    "head": (["lm_head"], {}, False, 3),
    "table": (["embed_tokens"], {}, False, 3),
    "both": (["lm_head", "embed_tokens"], {}, False, 4),
    "both-tied": (["embed_tokens"], {"ensure_weight_tying": True}, True, 3),
    "norms": (["norm"], {}, True, 5),
}


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("which", ["tiny_base", "untied_base"])
def test_tables_and_norms_that_are_saved_whole(
    which: str, name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base, (modules, options, stays_tied, changed) = request.getfixturevalue(which), SAVED[name]
    adapter = make_adapter(base, tmp_path / "adapter", modules_to_save=modules, **options)
    counts = merged_by(base, adapter, tmp_path / "merged")
    assert difference(base, adapter, tmp_path / "merged") < FLOAT32_BOUND
    tied = which == "tiny_base" and stays_tied
    model, files = reload(tmp_path / "merged", torch.float32), load_file(tmp_path / "merged/model.safetensors")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert read_json(tmp_path / "merged/config.json")["tie_word_embeddings"] is tied
    assert (HEAD in files) is not tied
    assert counts["tensors"] == len(files) == (11 if tied else 12)
    if which == "untied_base":
        assert counts["changed_tensors"] == changed
    held = load_file(adapter / "adapter_model.safetensors")
    for saved in (HEAD, TABLE):
        if f"base_model.model.{saved}" in held and saved in files:
            assert torch.equal(files[saved], held[f"base_model.model.{saved}"])


def test_an_adapted_output_layer_gets_a_table_of_its_own(tiny_base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "adapter", target_modules=["lm_head", "q_proj"])
    # Then PEFT saves the base's table as well: what stays of it here is the adapter alone.
    tensors = load_file(adapter / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".lora_" in name}
    save_file(kept, adapter / "adapter_model.safetensors")
    merged_by(tiny_base, adapter, tmp_path / "merged")
    assert difference(tiny_base, adapter, tmp_path / "merged") < FLOAT32_BOUND
    files = load_file(tmp_path / "merged/model.safetensors")
    assert torch.equal(files[TABLE], load_file(tiny_base / "model.safetensors")[TABLE].float())
    assert not torch.equal(files[TABLE], files[HEAD])


def test_a_saved_norm_that_training_left_as_it_was_is_no_error(tiny_base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "adapter", modules_to_save=["model.norm"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({**tensors, "base_model.model.model.norm.weight": torch.ones(64)}, adapter / "adapter_model.safetensors")
    assert merged_by(tiny_base, adapter, tmp_path / "merged")["changed_tensors"] == 2


@pytest.mark.parametrize("block_values", [1, 100, 1000])
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("which", ["untied_base", "conv1d_base"])
def test_blocks_of_any_size_give_the_same_model(
    which: str,
    use_dora: bool,
    block_values: int,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = request.getfixturevalue(which)
    conv1d = which == "conv1d_base"
    targets = ["c_attn", "c_fc", "c_proj"] if conv1d else "all-linear"
    adapter = make_adapter(base, tmp_path / "a", use_dora=use_dora, target_modules=targets, fan_in_fan_out=conv1d)
    monkeypatch.setattr(weights, "BLOCK_VALUES", block_values)
    merged_by(base, adapter, tmp_path / "merged")
    assert difference(base, adapter, tmp_path / "merged") < FLOAT32_BOUND


def test_the_number_of_threads_changes_no_byte(untied_base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    adapter = make_adapter(untied_base, tmp_path / "adapter", use_dora=True)
    monkeypatch.setattr(weights, "BLOCK_VALUES", 200)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            merged_by(untied_base, adapter, tmp_path / str(threads), "bfloat16")
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert len({sha256_tree(tmp_path / name) for name in ("1", "2", "5")}) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights: loftq"),
        ({"bias": "lora_only"}, "bias: lora_only"),
        ({"alora_invocation_tokens": [5]}, r"alora_invocation_tokens: \[5\]"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication"),
        ({"peft_type": "IA3"}, "peft_type: IA3"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_a_merge_does_not_know_are_refused_by_name(
    changes: dict[str, Any], message: str, tiny_base: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "adapter")
    write_json(adapter / "adapter_config.json", {**read_json(adapter / "adapter_config.json"), **changes})
    with pytest.raises(ExportError, match=rf"settings that a merge does not know: {message}"):
        merged_by(tiny_base, adapter, tmp_path / "merged")
    assert not list((tmp_path / "merged").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["embed_tokens"]}, r"lora_embedding_A"),
        ({"lora_bias": True}, r"lora_bias: True"),
        ({"bias": "all"}, "bias: all"),
    ],
    ids=["embedding", "lora_bias", "bias"],
)
def test_adapters_that_a_merge_does_not_know_are_refused_by_name(
    options: dict[str, Any], message: str, tiny_base: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "adapter", **options)
    with pytest.raises(ExportError, match=message):
        merged_by(tiny_base, adapter, tmp_path / "merged")


def test_an_update_of_another_shape_is_refused_before_anything_is_written(
    tiny_base: Path, untied_base: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "adapter", modules_to_save=["lm_head"])
    file, name = adapter / "adapter_model.safetensors", "base_model.model.lm_head.weight"
    tensors = load_file(file)
    save_file({**tensors, name: tensors[name][:20].clone()}, file)
    with pytest.raises(ExportError, match=r"lm_head\.weight is \(29, 64\) in the base and \(20, 64\) in the adapter"):
        merged_by(untied_base, adapter, tmp_path / "merged")
    narrow = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({**tensors, narrow: tensors[narrow][:, :32].clone()}, file)
    with pytest.raises(ExportError, match=r"q_proj\.weight is \(64, 64\) in the base and \(64, 32\) in the adapter"):
        merged_by(tiny_base, adapter, tmp_path / "merged")
    assert not list((tmp_path / "merged").glob("*.safetensors"))


def test_values_that_the_dtype_cannot_hold_are_an_error(tiny_base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "adapter", scale=1e5)
    with pytest.raises(ExportError, match="has infinite or undefined values after the merge"):
        merged_by(tiny_base, adapter, tmp_path / "merged", "float16")
    assert not list((tmp_path / "merged").glob("*.safetensors*"))
    merged_by(tiny_base, adapter, tmp_path / "merged", "bfloat16")
    adapter = make_adapter(tiny_base, tmp_path / "nan", scale=float("nan"))
    with pytest.raises(ExportError, match="has infinite or undefined values after the merge"):
        merged_by(tiny_base, adapter, tmp_path / "merged", "float32")


def test_a_quantised_base_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "adapter")
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    config = {**read_json(base / "config.json"), "quantization_config": {"quant_method": "fp8"}}
    write_json(base / "config.json", config)
    with pytest.raises(ExportError, match=r"quantised by fp8(.|\n)*the repository of 16-bit weights"):
        merged_by(base, adapter, tmp_path / "merged")
