from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from training_settings import make_lora
from transformers import AutoModelForCausalLM

from finetune.errors import ExportError
from finetune.export.merge import check_disk, check_memory, check_reload, merge_shards
from finetune.export.weights import count_parameters, shards_of
from finetune.io import read_json, sha256_tree, write_json
from finetune.training.model import add_adapter, attach_adapter, load_base, load_extended, save_adapter
from finetune.training.vocabulary import Extension

CPU = torch.device("cpu")
PROBE = torch.tensor([[1, 5, 6, 7, 8, 9, 2]])
# Row 5 stands for a reserved token of the base, 29 and 30 lie behind its last row.
NEW_IDS = (5, 29, 30)


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
    counts = merge_shards(base, adapter, target, "float32", [])
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
        merge_shards(tiny_base, adapter, tmp_path / name, "bfloat16", [])
    assert sha256_tree(tmp_path / "a") == sha256_tree(tmp_path / "b")
    assert load_file(tmp_path / "a" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


def test_an_adapter_that_changes_nothing_is_an_error(tiny_base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "adapter", scale=0.0)
    with pytest.raises(ExportError, match=r"the adapter changes no value of model\.layers\.0"):
        merge_shards(tiny_base, adapter, tmp_path, "bfloat16", [])


def test_an_adapter_of_another_base_is_an_error(tiny_base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name.replace("layers.0", "layers.5"): tensor for name, tensor in tensors.items()}, file)
    with pytest.raises(
        ExportError, match=r"2 adapter weights have no counterpart in the base, such as model\.layers\.5"
    ):
        merge_shards(tiny_base, adapter, tmp_path, "bfloat16", [])


def test_a_tensor_that_cannot_be_merged_is_an_error(tiny_base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.lm_head.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(ExportError, match=r"tensors that a merge does not know: base_model\.model\.lm_head\.weight"):
        merge_shards(tiny_base, adapter, tmp_path, "bfloat16", [])


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
    check_memory(tiny_base, "float32", beside_bytes=1)
    monkeypatch.setattr("finetune.export.merge.count_parameters", lambda _: 10**13)
    with pytest.raises(ExportError, match=r"the comparison in float32 needs 50,000,000,000,000 bytes of memory"):
        check_memory(tiny_base, "float32", beside_bytes=1)


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
        merge_shards(base, adapter, tmp_path / name, "bfloat16", [])
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


def make_extended_adapter(base: Path, folder: Path, ids: tuple[int, ...] = NEW_IDS) -> Path:
    """An adapter with LoRA weights and rows of new tokens, all moved from their start."""
    torch.manual_seed(1)
    extension = Extension(ids, ids[-1] + 1)
    lora = make_lora(target_modules=["q_proj", "down_proj"])
    model = add_adapter(load_extended(base, extension, None, torch.float32, CPU), lora, extension)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "trainable_tokens" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    save_adapter(model, folder)
    return folder


@pytest.mark.parametrize(("ids", "rows"), [(NEW_IDS, 31), ((27, 28), 29)], ids=["added", "padding"])
@pytest.mark.parametrize("which", ["tiny_base", "untied_base"])
def test_rows_of_new_tokens_are_merged_and_every_other_row_keeps_its_bytes(
    which: str, ids: tuple[int, ...], rows: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(which)
    adapter = make_extended_adapter(base, tmp_path / "adapter", ids)
    (tmp_path / "merged").mkdir()
    counts = merge_shards(base, adapter, tmp_path / "merged", "float32", ids)
    tables = ["model.embed_tokens.weight"] if which == "tiny_base" else ["lm_head.weight", "model.embed_tokens.weight"]
    assert counts == {
        "tensors": 11 + len(tables) - 1,
        "changed_tensors": 2 + len(tables),
        "new_tokens": len(ids),
    }
    assert read_json(tmp_path / "merged/config.json")["vocab_size"] == rows
    old, new = load_file(base / "model.safetensors"), load_file(tmp_path / "merged/model.safetensors")
    assert old.keys() == new.keys()
    held = load_file(adapter / "adapter_model.safetensors")
    kept = [row for row in range(29) if row not in ids]
    for name in tables:
        assert new[name].shape == (rows, 64)
        assert torch.equal(new[name][kept], old[name][kept].float())
        module = name.removesuffix(".weight")
        trained = held[f"base_model.model.{module}.token_adapter.trainable_tokens_delta"]
        assert torch.equal(new[name][list(ids)], trained)

    extended = load_extended(base, Extension(ids, rows), None, torch.float32, CPU)
    merged, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    check_reload(info, tmp_path / "merged")
    probe = torch.tensor([[1, *ids, 6, *ids, 7, 2]])
    with torch.inference_mode():
        expected = attach_adapter(extended, adapter)(probe).logits
        obtained = merged.eval()(probe).logits
    assert float((obtained - expected).abs().max()) < 1e-5
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) is (which == "tiny_base")


def test_rows_merge_over_shards_and_into_the_copy_that_some_makers_keep_of_a_tied_table(
    tiny_base: Path, untied_base: Path, tmp_path: Path
) -> None:
    sharded = tmp_path / "sharded"
    load_base(untied_base, None, torch.bfloat16, CPU).save_pretrained(sharded, max_shard_size="5KB")
    copied = tmp_path / "copied"
    shutil.copytree(tiny_base, copied)
    tensors = load_file(copied / "model.safetensors")
    copy = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file({**tensors, **copy}, copied / "model.safetensors", metadata={"format": "pt"})
    for base, whole in ((sharded, untied_base), (copied, tiny_base)):
        adapter = make_extended_adapter(whole, tmp_path / f"{base.name}-adapter")
        target = tmp_path / f"{base.name}-merged"
        target.mkdir()
        merge_shards(base, adapter, target, "bfloat16", NEW_IDS)
        merged, info = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, output_loading_info=True)
        check_reload(info, target)
        assert merged.config.vocab_size == merged.lm_head.weight.shape[0] == 31
        extended = attach_adapter(load_extended(whole, Extension(NEW_IDS, 31), None, torch.float32, CPU), adapter)
        assert float((logits(merged) - logits(extended)).abs().max()) < 2e-2


def test_a_merge_that_loses_the_rows_is_an_error(untied_base: Path, tmp_path: Path) -> None:
    plain = make_adapter(untied_base, tmp_path / "plain")
    with pytest.raises(ExportError, match="has 3 new tokens, and the adapter holds rows of 0"):
        merge_shards(untied_base, plain, tmp_path, "float32", NEW_IDS)
    adapter = make_extended_adapter(untied_base, tmp_path / "adapter")
    with pytest.raises(ExportError, match="has 0 new tokens, and the adapter holds rows of 3"):
        merge_shards(untied_base, adapter, tmp_path, "float32", [])
    with pytest.raises(ExportError, match="or of other ones"):
        merge_shards(untied_base, adapter, tmp_path, "float32", (6, 29, 30))
    tensors = load_file(adapter / "adapter_model.safetensors")
    lost = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, adapter / "adapter_model.safetensors")
    with pytest.raises(ExportError, match=r"the adapter names rows of lm_head and holds none"):
        merge_shards(untied_base, adapter, tmp_path, "float32", NEW_IDS)


@pytest.mark.parametrize("block_rows", [1, 3, 10])
def test_rows_are_merged_in_blocks_of_any_size(
    block_rows: int, untied_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_extended_adapter(untied_base, tmp_path / "adapter")
    merge_shards(untied_base, adapter, tmp_path / "whole", "bfloat16", NEW_IDS)
    monkeypatch.setattr("finetune.export.weights.BLOCK_VALUES", 64 * block_rows)
    merge_shards(untied_base, adapter, tmp_path / "parts", "bfloat16", NEW_IDS)
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(parts[name], whole[name])


def test_rows_that_equal_the_bases_are_an_error(tiny_base: Path, tmp_path: Path) -> None:
    ids = (27, 28)
    adapter = make_extended_adapter(tiny_base, tmp_path / "adapter", ids)
    file, name = adapter / "adapter_model.safetensors", "base_model.model.model.embed_tokens"
    held = load_file(tiny_base / "model.safetensors")["model.embed_tokens.weight"][list(ids)].float()
    save_file({**load_file(file), f"{name}.token_adapter.trainable_tokens_delta": held}, file)
    with pytest.raises(ExportError, match=r"the adapter changes no value of model\.embed_tokens\.weight"):
        merge_shards(tiny_base, adapter, tmp_path / "merged", "float32", ids)


def test_rows_for_a_base_of_another_size_are_an_error(tiny_base: Path, tmp_path: Path) -> None:
    adapter = make_extended_adapter(tiny_base, tmp_path / "adapter")
    smaller = tmp_path / "smaller"
    shutil.copytree(tiny_base, smaller)
    tensors = load_file(smaller / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:27].clone()
    save_file(tensors, smaller / "model.safetensors")
    with pytest.raises(
        ExportError, match=r"embed_tokens\.weight has 27 rows in the base, and the adapter leaves row 27"
    ):
        merge_shards(smaller, adapter, tmp_path, "float32", NEW_IDS)
