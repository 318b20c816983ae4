from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finetune.errors import ExportError
from finetune.export.merge import check_disk, check_memory, check_reload, count_parameters, merge_shards, shards_of
from finetune.io import read_json, sha256_tree, write_json
from finetune.training.model import attach_adapter, load_base, save_adapter

CPU = torch.device("cpu")
PROBE = torch.tensor([[1, 5, 6, 7, 8, 9, 2]])


def make_adapter(base: Path, folder: Path, *, scale: float = 0.2, **options: Any) -> Path:
    """An adapter with weights that are not zero, as training leaves them."""
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], **options)
    model = get_peft_model(load_base(base, None, torch.float32, CPU), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale)
    save_adapter(model, folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(PROBE).logits


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
@pytest.mark.parametrize("which", ["tiny_base", "untied_base"])
def test_merged_logits_equal_base_with_adapter(
    which: str, options: dict[str, bool], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(which)
    adapter = make_adapter(base, tmp_path / "adapter", **options)
    target = tmp_path / "merged"
    target.mkdir()
    counts = merge_shards(base, adapter, target, "float32")
    assert counts["changed_tensors"] == 2
    expected = logits(attach_adapter(load_base(base, None, torch.float32, CPU), adapter))
    merged, info = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, output_loading_info=True)
    check_reload(info, target)
    assert float((logits(merged) - expected).abs().max()) < 1e-5
    assert float((logits(load_base(base, None, torch.float32, CPU)) - expected).abs().max()) > 1e-2
    assert merged.config.tie_word_embeddings is (which == "tiny_base")
    assert ("lm_head.weight" in load_file(target / "model.safetensors")) is (which == "untied_base")


def test_sixteen_bit_merge_is_close_and_byte_equal_twice(tiny_base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "adapter")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        merge_shards(tiny_base, adapter, tmp_path / name, "bfloat16")
    assert sha256_tree(tmp_path / "a") == sha256_tree(tmp_path / "b")
    assert load_file(tmp_path / "a" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


def test_an_adapter_that_changes_nothing_is_an_error(tiny_base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "adapter", scale=0.0)
    with pytest.raises(ExportError, match=r"the adapter changes no value of model\.layers\.0"):
        merge_shards(tiny_base, adapter, tmp_path, "bfloat16")


def test_an_adapter_of_another_base_is_an_error(tiny_base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name.replace("layers.0", "layers.5"): tensor for name, tensor in tensors.items()}, file)
    with pytest.raises(
        ExportError, match=r"2 adapter weights have no counterpart in the base, such as model\.layers\.5"
    ):
        merge_shards(tiny_base, adapter, tmp_path, "bfloat16")


def test_a_tensor_that_cannot_be_merged_is_an_error(tiny_base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.lm_head.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(ExportError, match=r"tensors that a merge does not know: base_model\.model\.lm_head\.weight"):
        merge_shards(tiny_base, adapter, tmp_path, "bfloat16")


def test_too_small_a_disk_is_refused_before_writing(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10_000, 9_000, 1_000))
    target = tmp_path / "merged"
    with pytest.raises(ExportError, match=r"needs [\d,]+ bytes, and 1,000 are free"):
        check_disk(tiny_base, target, "bfloat16")
    assert not target.exists()


def test_too_little_memory_for_the_comparison_is_refused(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_memory(tiny_base, "float32")
    monkeypatch.setattr("finetune.export.merge.count_parameters", lambda _: 10**13)
    with pytest.raises(ExportError, match=r"the comparison in float32 needs 40,000,000,000,000 bytes of memory"):
        check_memory(tiny_base, "float32")


def test_shards_are_those_of_the_index_and_merge_as_one_file_does(untied_base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(untied_base, tmp_path / "adapter")
    sharded = tmp_path / "sharded"
    load_base(untied_base, None, torch.bfloat16, CPU).save_pretrained(sharded, max_shard_size="20KB")
    config = read_json(sharded / "config.json")
    write_json(sharded / "config.json", {**config, "auto_map": {"AutoModel": "evil.Model"}})
    # A file that some repositories keep beside the shards: the same weights under other names.
    shutil.copyfile(untied_base / "model.safetensors", sharded / "consolidated.safetensors")
    assert len(shards_of(sharded)) > 1
    assert count_parameters(sharded) == count_parameters(untied_base)
    for base, name in ((untied_base, "one"), (sharded, "many")):
        (tmp_path / name).mkdir()
        merge_shards(base, adapter, tmp_path / name, "bfloat16")
    many, info = AutoModelForCausalLM.from_pretrained(tmp_path / "many", dtype=torch.float32, output_loading_info=True)
    check_reload(info, tmp_path / "many")
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.float32)
    assert torch.equal(logits(many), logits(one))
    assert not (tmp_path / "many/consolidated.safetensors").exists()
    assert "auto_map" not in read_json(tmp_path / "many/config.json")


def test_a_weight_that_is_missing_on_reload_is_an_error(tmp_path: Path) -> None:
    check_reload({"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}, tmp_path)
    with pytest.raises(ExportError, match=r"does not load strictly: \{'missing_keys': \['lm_head\.weight'\]\}"):
        check_reload({"missing_keys": {"lm_head.weight"}, "unexpected_keys": set()}, tmp_path)


def test_a_base_without_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no model\.safetensors, nor an index of shards"):
        shards_of(tmp_path)
