"""A base whose vocabulary is extended: only the named rows and the LoRA weights are trained, saved and reloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny_training import CPU, train
from training_settings import make_lora, make_settings

from finetune.errors import DataError
from finetune.io import read_json, sha256_tree, write_json
from finetune.training.checkpoint import load_tensors
from finetune.training.model import add_adapter, attach_adapter, load_base, load_extended
from finetune.training.vocabulary import Extension, extend_vocabulary, read_extension, starting_row, unmoved_tokens

# Row 5 stands for a reserved token of the base, 29 and 30 lie behind its last row (28).
EXTENSION = Extension((5, 29, 30), 31)
BASES = ["tiny_base", "untied_base"]
INPUT, OUTPUT = (
    f"base_model.model.{module}.token_adapter.trainable_tokens_delta" for module in ("model.embed_tokens", "lm_head")
)
SMALL = make_lora(rank=2, alpha=4, target_modules=["q_proj"])
PROBE = torch.tensor([[1, 5, 6, 29, 7, 30, 9, 2]])


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def rows(new_ids: tuple[int, ...] = EXTENSION.ids) -> Dataset:
    """Ten rows of two documents; each has the new tokens between others."""
    packed = []
    for row in range(10):
        ids = [1, *(token for at, new in enumerate(new_ids) for token in (6 + (row + at) % 20, new)), 7, 2]
        labels = [-100, *ids[1:]] * 2
        packed.append({"input_ids": ids * 2, "labels": labels, "seq_lengths": [len(ids)] * 2})
    return Dataset.from_list(packed)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(PROBE).logits


def is_tied(base: Path) -> bool:
    return bool(read_json(base / "config.json")["tie_word_embeddings"])


def test_the_extension_of_a_tokenizer_is_read_in_order_of_ids(tmp_path: Path) -> None:
    assert read_extension(tmp_path) == Extension((), 0)
    trained = {"<|user|>": 30, "<|tool|>": 5, "<|bot|>": 29}
    write_json(tmp_path / "extension.json", {"trained_rows": trained, "rows_before": 29, "rows_after": 31})
    assert read_extension(tmp_path) == EXTENSION


@pytest.mark.parametrize("ids", [{}, {"a": 31}, {"a": 29, "b": 29}, {"a": -1}])
def test_an_extension_that_names_no_rows_or_wrong_ones_is_refused(ids: dict[str, int], tmp_path: Path) -> None:
    write_json(tmp_path / "extension.json", {"trained_rows": ids, "rows_before": 29, "rows_after": 31})
    with pytest.raises(DataError, match=r"the trained rows must be distinct ids below 31, got \["):
        read_extension(tmp_path)


def test_a_new_row_starts_at_the_mean_of_the_rows_that_are_not_trained() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [500.0, 500.0]])
    assert starting_row(weight, (2, 3)).tolist() == [2.0, 3.0]
    assert starting_row(weight, (2, 3)).dtype == torch.bfloat16


@pytest.mark.parametrize(("ids", "needed", "obtained"), [((5, 29, 30), 31, 31), ((27, 28), 29, 29), ((5, 26), 27, 29)])
def test_rows_are_added_or_found_in_the_padding_and_all_others_stay(
    ids: tuple[int, ...], needed: int, obtained: int, base: Path
) -> None:
    before = load_base(base, None, torch.float32, CPU)
    after = load_extended(base, Extension(ids, needed), None, torch.float32, CPU)
    assert after.config.vocab_size == obtained
    assert (after.lm_head.weight is after.model.embed_tokens.weight) is is_tied(base)
    for old, new in (
        (before.model.embed_tokens.weight, after.model.embed_tokens.weight),
        (before.lm_head.weight, after.lm_head.weight),
    ):
        kept = [row for row in range(29) if row not in ids]
        assert new.shape == (obtained, 64)
        assert torch.equal(new[kept], old[kept])
        assert torch.equal(new[list(ids)], starting_row(old, ids).float().expand(len(ids), -1))
    assert not any(parameter.requires_grad for parameter in after.parameters())


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_training_changes_the_named_rows_and_the_adapter_alone(
    quantization: str, base: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    use = make_settings(epochs=1)
    use = use.model_copy(update={"quantization": use.quantization.model_copy(update={"format": quantization})})
    fresh = load_extended(base, EXTENSION, use.quantization, torch.float32, CPU).state_dict()
    model, _ = train(base, tiny_tokenizer, tmp_path / "run", tmp_path / "a", use, rows=rows(), extension=EXTENSION)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    tables = {f"{INPUT}.default"} if is_tied(base) else {f"{INPUT}.default", f"{OUTPUT}.default"}
    assert {name for name in trained if "lora_" not in name} == tables
    plain = {
        name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".token_adapter", ""): tensor
        for name, tensor in model.state_dict().items()
        if "lora_" not in name and "trainable_tokens" not in name
    }
    assert plain.keys() == fresh.keys()
    assert all(torch.equal(plain[name], fresh[name]) for name in fresh)
    assert unmoved_tokens(model) == 0

    saved = load_file(tmp_path / "a/adapter_model.safetensors")
    assert {name for name in saved if "lora_" not in name} == {name.removesuffix(".default") for name in tables}
    assert all(tuple(saved[name.removesuffix(".default")].shape) == (3, 64) for name in tables)
    config = read_json(tmp_path / "a/adapter_config.json")
    named = {"model.embed_tokens": [5, 29, 30], "lm_head": [5, 29, 30]}
    assert config["trainable_token_indices"] == ({"model.embed_tokens": [5, 29, 30]} if is_tied(base) else named)
    assert config["modules_to_save"] is None
    # Whole tables in a checkpoint would make it as large as the base, and come back untied.
    sealed = load_tensors(tmp_path / "run/checkpoint-4")
    assert {name for name in sealed if name.startswith("weights.")} == {f"weights.{name}" for name in trained}


def test_a_saved_adapter_gives_the_trained_logits_and_without_it_the_extended_base(
    base: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    use = make_settings(epochs=1)
    model, _ = train(base, tiny_tokenizer, tmp_path / "run", tmp_path / "a", use, rows=rows(), extension=EXTENSION)
    loaded = attach_adapter(load_extended(base, EXTENSION, use.quantization, torch.float32, CPU), tmp_path / "a")
    assert torch.equal(logits(loaded), logits(model))
    bare = logits(load_extended(base, EXTENSION, use.quantization, torch.float32, CPU))
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), bare)
    assert float((logits(loaded) - bare).abs().max()) > 0.1


def test_a_run_that_was_cut_ends_in_the_same_rows(base: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    def run(name: str, mirror: Any = None) -> list[Any]:
        folder, target = tmp_path / name, tmp_path / f"{name}-adapter"
        use = make_settings(gradient_checkpointing="full")
        return train(base, tiny_tokenizer, folder, target, use, rows=rows(), extension=EXTENSION, mirror=mirror)[1]

    class PowerCutError(Exception):
        pass

    def cut_at_7(step: int, metrics: dict[str, float]) -> None:
        if step == 7:
            raise PowerCutError

    whole = run("whole")
    with pytest.raises(PowerCutError):
        run("cut", cut_at_7)
    assert run("cut") == whole
    assert sha256_tree(tmp_path / "cut-adapter") == sha256_tree(tmp_path / "whole-adapter")


def test_a_token_that_no_row_has_is_counted_and_none_that_moves_is_an_error(
    untied_base: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    use = make_settings(epochs=1, lora=SMALL)
    # The input row of 30 gets no gradient, its output row does.
    model, _ = train(
        untied_base, tiny_tokenizer, tmp_path / "run", tmp_path / "a", use, rows=rows((5, 29)), extension=EXTENSION
    )
    assert unmoved_tokens(model) == 1
    untrained = add_adapter(load_extended(untied_base, EXTENSION, None, torch.float32, CPU), SMALL, EXTENSION)
    with pytest.raises(DataError, match="not one row of the 3 new tokens moved in training"):
        unmoved_tokens(untrained)
    kept = Extension((), 0)
    assert unmoved_tokens(add_adapter(load_base(untied_base, None, torch.float32, CPU), SMALL, kept)) == 0


def test_a_row_that_nothing_fills_is_refused(tiny_base: Path) -> None:
    with pytest.raises(DataError, match=r"has 29 embedding rows, and no trained token fills row 29 \(2 of 3 new rows"):
        load_extended(tiny_base, Extension((31,), 32), None, torch.float32, CPU)


def test_an_output_layer_with_a_bias_is_refused(untied_base: Path) -> None:
    model = load_base(untied_base, None, torch.float32, CPU)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(29))
    with pytest.raises(DataError, match="output layer has a bias, and its rows cannot be trained alone"):
        extend_vocabulary(model, EXTENSION)
