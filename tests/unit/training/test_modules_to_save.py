"""Adapters of every kind, with modules trained whole beside them: trained, saved, reloaded, merged."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_methods import EXTENSION, PROBE, PROBE_OF_NEW, logits, reload_trained, rows_with, train_and_save
from tiny_training import CPU, KEPT
from training_settings import NF4, PLAIN, TARGETS, make_lora, make_settings
from trl.trainer.utils import add_fused_lm_head

from finetune.errors import DataError, DeviceError
from finetune.export.four_bit import ways_to_merge
from finetune.export.merge import merge_shards, reload
from finetune.io import read_json, sha256_tree, write_json
from finetune.training.method import make_trainable
from finetune.training.model import add_adapter, four_bit_layers, load_base, load_extended
from finetune.training.trained_on import read_trained_on
from finetune.training.vocabulary import unmoved_tokens

HEAD, TABLE, NORM = "lm_head", "model.embed_tokens", "model.norm"
INNER_NORM = "model.layers.0.input_layernorm"


def settings(quantization: Any = PLAIN, **lora: Any) -> Any:
    return make_settings(epochs=1, quantization=quantization, lora=make_lora(rank=2, alpha=4, **lora))


def whole_in(model: Any) -> dict[str, torch.Tensor]:
    """The trained copies, by the name of the module in the base; a tied one under its first name."""
    found = {name: p for name, p in model.named_parameters() if ".modules_to_save.default." in name}
    return {name.removeprefix("base_model.model.").split(".modules_to_save.")[0]: p for name, p in found.items()}


# By what modules_to_save names: which modules are trained in a tied base, and in an untied one.
NAMED = {
    "head": (["lm_head"], {HEAD, TABLE}, {HEAD}, NF4),
    "table": (["embed_tokens"], {HEAD, TABLE}, {TABLE}, PLAIN),
    "tables": (["embed_tokens", "lm_head"], {HEAD, TABLE}, {HEAD, TABLE}, NF4),
    # Not every norm, whose names end so as well.
    "norms": (["norm", "input_layernorm"], {NORM, INNER_NORM}, {NORM, INNER_NORM}, PLAIN),
}


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("which", ["tiny_base", "untied_base"])
def test_modules_that_are_named_are_trained_whole_saved_reloaded_and_merged(
    which: str, name: str, request: pytest.FixtureRequest, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    base, (named, in_tied, in_untied, quantization) = request.getfixturevalue(which), NAMED[name]
    tied, expected_names = which == "tiny_base", in_tied if which == "tiny_base" else in_untied
    use = settings(quantization, modules_to_save=named)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*tie.*")
        model = train_and_save(base, tiny_tokenizer, tmp_path, use)
    start = load_base(base, quantization, torch.float32, CPU)
    trained = whole_in(model)
    assert set(trained) == (expected_names - {HEAD} if tied else expected_names)
    assert [name for name, values in trained.items() if torch.equal(values, start.get_submodule(name).weight)] == []
    assert {values.dtype for values in trained.values()} == {torch.float32}
    if HEAD in trained:
        # Every row is an answer that could have been given: the fused output layer reads the copy that is trained.
        assert bool((trained[HEAD] != start.lm_head.weight).any(dim=1).all())
    if tied and TABLE in trained:
        assert model.get_output_embeddings().weight is trained[TABLE]

    held = load_file(tmp_path / "trained/adapter_model.safetensors")
    assert {key for key in held if "lora_" not in key} == {f"base_model.model.{name}.weight" for name in expected_names}
    assert read_json(tmp_path / "trained/adapter_config.json")["modules_to_save"] == sorted(expected_names)
    loaded, expected = reload_trained(base, tmp_path), logits(model)
    assert torch.equal(logits(loaded), expected)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(start))
    assert float((expected - logits(start)).abs().max()) > 0.02

    way = "dequantized" if quantization is NF4 else "original"
    four_bit = ways_to_merge(read_trained_on(tmp_path / "trained", base), way)[way]
    merge_shards(base, tmp_path / "trained", tmp_path / "merged", "float32", [], four_bit)
    merged = reload(tmp_path / "merged", torch.float32)
    assert float((logits(merged) - expected).abs().max()) < 1e-5
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) is tied
    assert merged.config.tie_word_embeddings is tied


def test_a_tied_table_of_another_name_stays_tied(conv1d_base: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    use = settings(target_modules=["c_attn", "c_fc"], modules_to_save=["wte", "ln_f"])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*tie.*")
        model = train_and_save(conv1d_base, tiny_tokenizer, tmp_path, use)
        loaded = reload_trained(conv1d_base, tmp_path)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(logits(loaded), logits(model))
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(load_base(conv1d_base, None, torch.float32, CPU)))
    merge_shards(conv1d_base, tmp_path / "trained", tmp_path / "merged", "float32", [])
    merged = reload(tmp_path / "merged", torch.float32)
    assert float((logits(merged) - logits(model)).abs().max()) < 1e-5
    assert merged.lm_head.weight is merged.transformer.wte.weight


@pytest.mark.parametrize(
    ("which", "named"),
    [
        ("tiny_base", ["embed_tokens"]),
        ("tiny_base", ["norm"]),
        ("untied_base", ["embed_tokens", "lm_head"]),
        ("untied_base", ["embed_tokens"]),
        ("untied_base", ["lm_head"]),
    ],
    ids=str,
)
def test_new_tokens_are_trained_in_whole_tables_or_beside_them(
    which: str, named: list[str], request: pytest.FixtureRequest, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    base = request.getfixturevalue(which)
    model = train_and_save(base, tiny_tokenizer, tmp_path, settings(modules_to_save=named), EXTENSION)
    assert unmoved_tokens(model) == 0
    expected = logits(model, PROBE_OF_NEW)
    bare = logits(load_extended(base, EXTENSION, None, torch.float32, CPU), PROBE_OF_NEW)
    loaded = reload_trained(base, tmp_path, EXTENSION)
    assert torch.equal(logits(loaded, PROBE_OF_NEW), expected)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded, PROBE_OF_NEW), bare)
    whole = {name for name in whole_in(model) if name in (HEAD, TABLE)}
    rows = {name for name in (HEAD, TABLE) if which == "untied_base" or name == TABLE} - whole
    indices = read_json(tmp_path / "trained/adapter_config.json")["trainable_token_indices"]
    assert indices == ({name: [5, 29, 30] for name in rows} if rows else None)
    counts = merge_shards(base, tmp_path / "trained", tmp_path / "merged", "float32", EXTENSION.ids)
    assert counts["new_tokens"] == 3
    merged = reload(tmp_path / "merged", torch.float32)
    assert float((logits(merged, PROBE_OF_NEW) - expected).abs().max()) < 1e-5
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) is (which == "tiny_base")


def test_a_new_token_that_no_row_has_is_counted_in_a_whole_table_too(
    untied_base: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    use = settings(modules_to_save=["embed_tokens", "lm_head"])
    assert (
        unmoved_tokens(train_and_save(untied_base, tiny_tokenizer, tmp_path, use, EXTENSION, rows_with((5, 29)))) == 1
    )
    untrained = make_trainable(load_extended(untied_base, EXTENSION, None, torch.float32, CPU), use, EXTENSION)
    with pytest.raises(DataError, match="not one row of the 3 new tokens moved in training"):
        unmoved_tokens(untrained)


@pytest.mark.parametrize("which", ["tiny_base", "untied_base"])
def test_the_fused_output_layer_gives_the_loss_and_gradient_of_the_plain_one(
    which: str, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(which)
    labels = torch.where(torch.arange(PROBE.shape[1]) < 2, -100, PROBE)
    losses, gradients = [], []
    for fused in (False, True):
        torch.manual_seed(1)
        use = settings(modules_to_save=["lm_head", "norm"])
        model = make_trainable(load_base(base, None, torch.float32, CPU), use, KEPT)
        # A copy that differs from the base's own table, which a wrong path would read.
        whole_in(model)[HEAD if which == "untied_base" else TABLE].data.mul_(2)
        add_fused_lm_head(model.get_base_model())
        loss = model(input_ids=PROBE, labels=labels, fused_lm_head=fused).loss
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append({name: values.grad for name, values in whole_in(model).items()})
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for name, gradient in gradients[0].items():
        assert float(gradient.abs().max()) > 1e-3
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("named", "quantization", "there"),
    [
        (["head"], PLAIN, "embed_tokens, input_layernorm, k_proj, lm_head, norm, post_attention_layernorm"),
        (["lm_head", "layernorm"], PLAIN, "embed_tokens, input_layernorm, k_proj, lm_head"),
        (["mlp"], PLAIN, "embed_tokens, input_layernorm, k_proj, lm_head"),
        (["q_proj"], PLAIN, "embed_tokens, input_layernorm, k_proj, lm_head"),
        (["k_proj"], NF4, "embed_tokens, input_layernorm, lm_head, norm"),
    ],
    ids=["unknown", "part of a name", "block", "adapted", "four bit"],
)
def test_what_cannot_be_trained_whole_is_refused_with_what_can(
    named: list[str], quantization: Any, there: str, untied_base: Path
) -> None:
    lora = make_lora(target_modules=[name for name in TARGETS if name != "k_proj"], modules_to_save=named)
    model = load_base(untied_base, quantization, torch.float32, CPU)
    with pytest.raises(DataError, match=rf"to train whole named {named[-1]} (.|\n)*choose among: {there}"):
        add_adapter(model, lora, KEPT)


CONV1D_TARGETS = ["c_attn", "c_proj", "c_fc"]


@pytest.mark.parametrize(
    ("which", "quantization", "flags"),
    [
        ("tiny_base", PLAIN, ["use_dora", "use_rslora"]),
        ("tiny_base", NF4, ["use_rslora"]),
        ("untied_base", NF4, ["use_dora"]),
        ("conv1d_base", NF4, ["use_dora"]),
        ("conv1d_base", PLAIN, ["use_rslora"]),
    ],
    ids=["both", "rslora-nf4", "dora-nf4", "dora-nf4-conv1d", "rslora-conv1d"],
)
def test_dora_and_rslora_are_trained_saved_reloaded_and_merged(
    which: str,
    quantization: Any,
    flags: list[str],
    request: pytest.FixtureRequest,
    tiny_tokenizer: Any,
    tmp_path: Path,
) -> None:
    base, trained = request.getfixturevalue(which), tmp_path / "trained"
    targets = CONV1D_TARGETS if which == "conv1d_base" else ["q_proj", "k_proj", "down_proj"]
    use = settings(quantization, target_modules=targets, **dict.fromkeys(flags, True))
    model = train_and_save(base, tiny_tokenizer, tmp_path, use)
    expected = logits(model)
    assert torch.equal(logits(reload_trained(base, tmp_path)), expected)
    held = load_file(trained / "adapter_model.safetensors")
    magnitudes = [values for name, values in held.items() if "magnitude" in name]
    assert len(magnitudes) == (len(held) // 3 if "use_dora" in flags else 0)
    assert {values.dtype for values in held.values()} == {torch.float32}
    way = "dequantized" if quantization is NF4 else "original"
    four_bit = ways_to_merge(read_trained_on(trained, base), way)[way]
    merge_shards(base, trained, tmp_path / "merged", "float32", [], four_bit)
    assert float((logits(reload(tmp_path / "merged", torch.float32)) - expected).abs().max()) < 1e-5
    # Without the square root the same matrices give another model.
    if "use_rslora" in flags:
        config = trained / "adapter_config.json"
        write_json(config, {**read_json(config), "use_rslora": False})
        assert float((logits(reload_trained(base, tmp_path)) - expected).abs().max()) > 1e-3


def test_saved_bytes_are_the_same_again(tiny_base: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    use = settings(modules_to_save=["embed_tokens", "norm", "input_layernorm"])
    for name in ("one", "two"):
        train_and_save(tiny_base, tiny_tokenizer, tmp_path / name, use)
    assert sha256_tree(tmp_path / "one/trained") == sha256_tree(tmp_path / "two/trained")


def test_a_target_that_is_not_in_four_bit_beside_others_that_are_is_refused(untied_base: Path) -> None:
    model = load_base(untied_base, NF4, torch.float32, CPU)
    assert four_bit_layers(model) == 7
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(64, 128, bias=False)
    with pytest.raises(DeviceError, match=r"1 of 2 layers to adapt are not in 4 bit, such as model\.layers\.0\.mlp"):
        add_adapter(model, make_lora(target_modules=["up_proj", "q_proj"]), KEPT)
    add_adapter(model, make_lora(target_modules=["q_proj"]), KEPT)
