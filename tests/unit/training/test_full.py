"""Full fine-tuning on tiny bases: trained, saved, loaded beside the base, merged and reloaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_methods import EXTENSION, PROBE, PROBE_OF_NEW, logits, reload_trained, rows_with, train_and_save
from tiny_training import CPU, KEPT
from training_settings import PLAIN, make_lora, make_settings
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.errors import DataError, ExportError
from finetune.export.merge import merge_shards, reload
from finetune.io import read_json, sha256_tree, write_json
from finetune.training import full
from finetune.training.method import (
    load_beside_base,
    load_trained,
    loading_dtype,
    make_trainable,
    save_trained,
)
from finetune.training.model import load_base, load_extended
from finetune.training.trained_on import describe, read_trained_on
from finetune.training.vocabulary import Extension, unmoved_tokens

FULL = make_settings(method="full", lora=None, quantization=PLAIN, epochs=1, learning_rate=0.003)
BASES = ["tiny_base", "untied_base", "conv1d_base"]
# One-layer models; of Llama: a table, nine weights of the layer and the last norm. GPT-2: two tables, twelve and two.
PARAMETERS = {"tiny_base": 11, "untied_base": 12, "conv1d_base": 16}


def save_untrained(base: Path, folder: Path, extension: Extension = KEPT) -> Path:
    model = load_extended(base, extension, PLAIN, torch.float32, CPU)
    trained_on = describe(base, model)
    save_trained(make_trainable(model, FULL, extension), trained_on, folder)
    return folder


def test_every_weight_is_trainable_and_in_float32_whatever_is_computed_in(tiny_base: Path) -> None:
    half = make_settings(method="full", lora=None, quantization=PLAIN, compute_dtype="bfloat16")
    assert loading_dtype(half) == torch.float32
    assert loading_dtype(make_settings(compute_dtype="bfloat16")) == torch.bfloat16
    model = make_trainable(load_base(tiny_base, PLAIN, torch.bfloat16, CPU), half, KEPT)
    assert [(p.dtype, p.requires_grad) for p in model.parameters()] == [(torch.float32, True)] * 11


@pytest.mark.parametrize("which", BASES)
def test_a_trained_model_is_saved_reloaded_and_merged_to_equal_logits(
    which: str, request: pytest.FixtureRequest, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    base = request.getfixturevalue(which)
    start = load_base(base, None, torch.float32, CPU)
    before, bare = {name: p.detach().clone() for name, p in start.named_parameters()}, logits(start)
    model = train_and_save(base, tiny_tokenizer, tmp_path, FULL)
    after = dict(model.named_parameters())
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert unmoved_tokens(model) == 0

    trained = tmp_path / "trained"
    assert {file.name for file in trained.iterdir()} == {"model.safetensors", "trained_on.json"}
    assert read_json(trained / "trained_on.json")["method"] == "full"
    held = load_file(trained / "model.safetensors")
    assert {tensor.dtype for tensor in held.values()} == {torch.float32}
    assert len(held) == PARAMETERS[which]
    expected = logits(model)
    assert torch.equal(logits(reload_trained(base, tmp_path)), expected)
    assert float((expected - bare).abs().max()) > 0.1

    counts = merge_shards(base, trained, tmp_path / "merged", "float32", [])
    assert counts == {"tensors": PARAMETERS[which], "changed_tensors": PARAMETERS[which], "new_tokens": 0}
    merged = reload(tmp_path / "merged", torch.float32)
    assert torch.equal(logits(merged), expected)
    tied = which != "untied_base"
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) is tied
    merge_shards(base, trained, tmp_path / "half", "bfloat16", [])
    assert 0 < float((logits(reload(tmp_path / "half", torch.float32)) - expected).abs().max()) < 0.1


def test_the_base_stands_beside_the_tuned_model(tiny_base: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = train_and_save(tiny_base, tiny_tokenizer, tmp_path, FULL)
    both = load_beside_base(tiny_base, tmp_path / "trained", KEPT, None, torch.float32, CPU)
    bare = logits(load_base(tiny_base, None, torch.float32, CPU))
    for _ in range(2):
        assert torch.equal(logits(both), logits(model))
        with both.disable_adapter():
            assert torch.equal(logits(both), bare)
    with pytest.raises(KeyError), both.disable_adapter():
        raise KeyError
    assert torch.equal(logits(both), logits(model))


@pytest.mark.parametrize("which", BASES)
def test_new_tokens_are_trained_with_their_tables(
    which: str, request: pytest.FixtureRequest, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    base = request.getfixturevalue(which)
    model = train_and_save(base, tiny_tokenizer, tmp_path, FULL, EXTENSION)
    assert unmoved_tokens(model) == 0
    expected = logits(model, PROBE_OF_NEW)
    assert torch.equal(logits(reload_trained(base, tmp_path, EXTENSION), PROBE_OF_NEW), expected)
    counts = merge_shards(base, tmp_path / "trained", tmp_path / "merged", "float32", EXTENSION.ids)
    tensors = PARAMETERS[which]
    assert counts == {"tensors": tensors, "changed_tensors": tensors, "new_tokens": 3}
    merged = reload(tmp_path / "merged", torch.float32)
    assert merged.config.vocab_size == 31
    assert torch.equal(logits(merged, PROBE_OF_NEW), expected)
    with pytest.raises(DataError, match=r"weight is \(31, 64\) in training and \(29, 64\) here"):
        reload_trained(base, tmp_path)
    with pytest.raises(ExportError, match=r"weight is \(29, 64\) in the base and \(31, 64\) in the adapter"):
        merge_shards(base, tmp_path / "trained", tmp_path / "other", "float32", [])


def test_a_token_that_no_row_has_is_counted_and_none_that_moves_is_an_error(
    untied_base: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    # The input row of 30 gets no gradient, its output row does.
    model = train_and_save(untied_base, tiny_tokenizer, tmp_path, FULL, EXTENSION, rows_with((5, 29)))
    assert unmoved_tokens(model) == 1
    untrained = make_trainable(load_extended(untied_base, EXTENSION, None, torch.float32, CPU), FULL, EXTENSION)
    with pytest.raises(DataError, match="not one row of the 3 new tokens moved in training"):
        unmoved_tokens(untrained)


def test_shards_hold_what_one_file_does(untied_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = save_untrained(untied_base, tmp_path / "one")
    monkeypatch.setattr(full, "SHARD_BYTES", 40_000)
    many = save_untrained(untied_base, tmp_path / "many")
    index = read_json(many / "model.safetensors.index.json")
    assert len(set(index["weight_map"].values())) > 2
    # 29 x 64 values of two tables, 3 norms of 64, the seven linear layers; 4 bytes each.
    linear = 64 * 64 * 2 + 32 * 64 * 2 + 64 * 128 * 3
    assert index["metadata"] == {"total_size": 4 * (2 * 29 * 64 + 3 * 64 + linear)}
    whole = load_file(one / "model.safetensors")
    for name, tensor in whole.items():
        tensor.mul_(1.5)
        file = many / index["weight_map"][name]
        save_file({**load_file(file), name: tensor}, file)
    save_file(whole, one / "model.safetensors")
    obtained = [logits(load_trained(untied_base, path, KEPT, None, torch.float32, CPU)) for path in (one, many)]
    assert torch.equal(*obtained)
    merged = []
    for path in (one, many):
        merge_shards(untied_base, path, tmp_path / f"{path.name}-merged", "bfloat16", [])
        merged.append(sha256_tree(tmp_path / f"{path.name}-merged"))
    assert merged[0] == merged[1]


def test_a_training_that_changed_nothing_is_no_merged_model(tiny_base: Path, tmp_path: Path) -> None:
    trained = save_untrained(tiny_base, tmp_path / "trained")
    with pytest.raises(ExportError, match="the merged model has every value of the base"):
        merge_shards(tiny_base, trained, tmp_path / "merged", "bfloat16", [])
    assert not (tmp_path / "merged/config.json").exists()
    # A change that is smaller than bfloat16 can tell from the base's value is none; in float32 it is one.
    file = trained / "model.safetensors"
    save_file({name: tensor * (1 + 1e-6) for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ExportError, match="by less than dtype can hold"):
        merge_shards(tiny_base, trained, tmp_path / "merged", "bfloat16", [])
    assert merge_shards(tiny_base, trained, tmp_path / "merged", "float32", [])["changed_tensors"] == 11


def test_weights_that_are_missing_unknown_or_damaged_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    trained = save_untrained(tiny_base, tmp_path / "trained")
    file = trained / "model.safetensors"
    whole = load_file(file)
    norm = "model.norm.weight"

    def refused(tensors: dict[str, torch.Tensor], load: str, merge: str) -> None:
        save_file(tensors, file)
        with pytest.raises(DataError, match=load):
            load_trained(tiny_base, trained, KEPT, None, torch.float32, CPU)
        with pytest.raises(ExportError, match=merge):
            merge_shards(tiny_base, trained, tmp_path / "merged", "float32", [])

    less = {name: tensor for name, tensor in whole.items() if name != norm}
    refused(less, r"1 of 11 weights are missing, such as model\.norm\.weight", r"1 differ, such as model\.norm\.weight")
    more = {**whole, "model.extra.weight": torch.zeros(2)}
    refused(more, r"model\.extra\.weight is \(2,\) in training and none here", r"such as model\.extra\.weight")
    short = {**whole, norm: torch.zeros(63)}
    refused(
        short, r"norm\.weight is \(63,\) in training and \(64,\) here", r"is \(64,\) in the base and \(63,\) in the ad"
    )
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"the trained weights cannot be read(.|\n)*--single-item train_qlora"):
        load_trained(tiny_base, trained, KEPT, None, torch.float32, CPU)
    file.unlink()
    with pytest.raises(DataError, match="the trained weights cannot be read"):
        load_trained(tiny_base, trained, KEPT, None, torch.float32, CPU)


def test_a_folder_that_names_no_method_is_refused(tiny_base: Path, untied_base: Path, tmp_path: Path) -> None:
    trained = save_untrained(tiny_base, tmp_path / "trained")
    with pytest.raises(DataError, match="trained on another base"):
        read_trained_on(trained, untied_base)
    shutil.copytree(trained, tmp_path / "other")
    said = read_json(trained / "trained_on.json")
    write_json(tmp_path / "other/trained_on.json", {**said, "method": "prefix"})
    with pytest.raises(DataError, match="the training's method is prefix, none of these"):
        load_trained(tiny_base, tmp_path / "other", KEPT, None, torch.float32, CPU)
    assert logits(load_trained(tiny_base, trained, KEPT, None, torch.float32, CPU)).shape == (1, PROBE.shape[1], 29)


def test_a_model_without_values_is_made_trainable_to_count_its_bytes(untied_base: Path) -> None:
    adapted = make_settings(quantization=PLAIN, lora=make_lora(modules_to_save=["lm_head"]))
    # The base has 29 x 64 values of two tables, 3 norms of 64 and seven linear layers; rank 4 beside six of these.
    table, linear = 29 * 64, 64 * 64 * 2 + 32 * 64 * 2 + 64 * 128 * 3
    low_rank = 4 * (2 * (64 + 64) + (64 + 32) + 3 * (64 + 128))
    for use, trained in ((FULL, 2 * table + 3 * 64 + linear), (adapted, low_rank + table + 5 * 64)):
        config = AutoConfig.from_pretrained(untied_base)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
        counted = make_trainable(model, use, Extension((3, 4, 5, 6, 28), 29))
        assert sum(weight.numel() for weight in counted.parameters() if weight.requires_grad) == trained
