"""GPT-2 from base to GGUF: its layers are Conv1D, which hold a weight as [in, out], and its tables are tied."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tiny_gpt2 import LAYERS, POSITIONS, TEXTS, VOCABULARY, WIDTH, write_base, write_tokenizer
from tiny_training import CPU, train
from training_settings import make_lora, make_settings
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.errors import DataError
from finetune.evaluation.perplexity import model_logits
from finetune.export import gguf
from finetune.export.gguf_vocab import read_facts
from finetune.export.merge import check_reload, merge_shards
from finetune.io import read_json, write_json
from finetune.training.model import add_adapter, attach_adapter, four_bit_layers, load_base, load_extended, save_adapter
from finetune.training.vocabulary import Extension, read_extension, unmoved_tokens
from finetune.training_sections import Lora, Quantization

TARGETS = ["c_proj", "c_attn", "c_fc"]
PAD = VOCABULARY
KEPT = Extension((), 0)
PLAIN, NF4 = (Quantization(format=name, double_quantization=False) for name in ("none", "nf4"))


def lora(**changes: Any) -> Lora:
    return make_lora(**{"target_modules": TARGETS, **changes})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


def moved_adapter(base: Path, folder: Path, settings: Lora, quantization: Quantization = PLAIN) -> Path:
    """An adapter whose weights are not zero, as training leaves them."""
    torch.manual_seed(1)
    model = add_adapter(load_base(base, quantization, torch.float32, CPU), settings, KEPT)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    save_adapter(model, folder)
    return folder


def reload(folder: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    check_reload(info, folder)
    return model.eval()


def difference(one: Any, other: Any, ids: list[int]) -> float:
    return float((model_logits(one)(ids) - model_logits(other)(ids)).abs().max())


@pytest.mark.parametrize("quantization", [PLAIN, NF4], ids=["none", "nf4"])
def test_conv1d_layers_are_adapted_and_their_order_is_stated(
    quantization: Quantization, base: Path, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fan_in_fan_out.*")
        for name, targets in (("a", TARGETS), ("b", TARGETS[::-1])):
            moved_adapter(base, tmp_path / name, lora(target_modules=targets), quantization)
        attach_adapter(load_base(base, None, torch.float32, CPU), tmp_path / "a")
    text = (tmp_path / "a/adapter_config.json").read_bytes()
    assert text == (tmp_path / "b/adapter_config.json").read_bytes()
    config = read_json(tmp_path / "a/adapter_config.json")
    assert config["fan_in_fan_out"] is True
    assert config["target_modules"] == ["c_attn", "c_fc", "c_proj"]
    held = load_file(tmp_path / "a/adapter_model.safetensors")
    # Two matrices for each of c_attn, both c_proj and c_fc.
    assert len(held) == LAYERS * 4 * 2
    layer = "base_model.model.transformer.h.1"
    assert held[f"{layer}.attn.c_attn.lora_B.weight"].shape == (3 * WIDTH, 4)
    assert held[f"{layer}.mlp.c_proj.lora_A.weight"].shape == (4, 4 * WIDTH)


def test_the_tied_output_layer_and_unknown_names_are_refused(base: Path) -> None:
    model = load_base(base, None, torch.float32, CPU)
    with pytest.raises(
        DataError, match=r"named lm_head, q_proj(.|\n)*target_modules(.|\n)*choose among: c_attn, c_fc, c_proj"
    ):
        add_adapter(model, lora(target_modules=["q_proj", "c_fc", "lm_head"]), KEPT)


def test_four_bit_layers_hold_the_weight_turned_and_the_bias(base: Path) -> None:
    model = load_base(base, NF4, torch.float32, CPU)
    plain = load_base(base, None, torch.float32, CPU).state_dict()
    assert four_bit_layers(model) == LAYERS * 4
    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit):
            weight = plain[f"{name}.weight"].T
            error = dequantize_4bit(layer.weight.data, layer.weight.quant_state) - weight
            # Half of NF4's widest step, between -1 and -0.6962 of a block's largest value.
            assert float(error.abs().max() / weight.abs().max()) < 0.152
            assert torch.equal(layer.bias, plain[f"{name}.bias"])
    assert difference(model, load_base(base, None, torch.float32, CPU), list(range(50))) < 0.2


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
@pytest.mark.parametrize("quantization", [PLAIN, NF4], ids=["none", "nf4"])
def test_merged_logits_equal_base_with_adapter(
    quantization: Quantization, options: dict[str, bool], base: Path, tmp_path: Path
) -> None:
    adapter = moved_adapter(base, tmp_path / "adapter", lora(**options), quantization)
    (tmp_path / "merged").mkdir()
    counts = merge_shards(base, adapter, tmp_path / "merged", "float32", [])
    # 12 tensors a layer without its mask, two tables and the last norm.
    assert counts == {"tensors": LAYERS * 12 + 4, "changed_tensors": LAYERS * 4, "new_tokens": 0}
    plain = load_base(base, None, torch.float32, CPU)
    merged, ids = reload(tmp_path / "merged"), list(range(0, 300, 5))
    assert difference(plain, merged, ids) > 0.1
    assert difference(attach_adapter(plain, adapter), merged, ids) < 1e-5
    old, new = load_file(base / "model.safetensors"), load_file(tmp_path / "merged/model.safetensors")
    assert old.keys() - new.keys() == {"h.0.attn.bias", "h.1.attn.bias"}
    changed = {name for name in new if not torch.equal(new[name], old[name])}
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert changed == {f"h.{at}.{layer}.weight" for at in range(LAYERS) for layer in layers}


def test_a_square_delta_is_turned(base: Path, tmp_path: Path) -> None:
    adapter = moved_adapter(base, tmp_path / "adapter", lora(target_modules=["c_proj"]))
    (tmp_path / "merged").mkdir()
    merge_shards(base, adapter, tmp_path / "merged", "float32", [])
    held, name = load_file(adapter / "adapter_model.safetensors"), "h.0.attn.c_proj"
    a, b = (held[f"base_model.model.transformer.{name}.lora_{part}.weight"] for part in "AB")
    old, new = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    assert old[f"{name}.weight"].shape == (WIDTH, WIDTH)
    # alpha 8 over rank 4 is 2.
    torch.testing.assert_close(new[f"{name}.weight"] - old[f"{name}.weight"], 2 * (b @ a).T, atol=1e-6, rtol=0)


def test_shards_with_whole_names_merge_as_one_file_does_and_the_index_leaves_masks_out(
    base: Path, tmp_path: Path
) -> None:
    adapter = moved_adapter(base, tmp_path / "adapter", lora())
    sharded = tmp_path / "sharded"
    load_base(base, None, torch.float32, CPU).save_pretrained(sharded, max_shard_size="2MB")
    index = read_json(sharded / "model.safetensors.index.json")
    shard = index["weight_map"]["transformer.h.1.ln_1.weight"]
    mask = {"transformer.h.1.attn.masked_bias": torch.tensor(-1e4)}
    save_file({**load_file(sharded / shard), **mask}, sharded / shard, metadata={"format": "pt"})
    names = {**index["weight_map"], **dict.fromkeys(mask, shard)}
    write_json(sharded / "model.safetensors.index.json", {**index, "weight_map": names})
    for source, name in ((base, "one"), (sharded, "many")):
        (tmp_path / name).mkdir()
        merge_shards(source, adapter, tmp_path / name, "bfloat16", [])
    one, many = (reload(tmp_path / name).state_dict() for name in ("one", "many"))
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert read_json(tmp_path / "many/model.safetensors.index.json")["weight_map"] == index["weight_map"]
    assert len(set(index["weight_map"].values())) > 1


def documents(seed: int, number: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return [[0, *torch.randint(1, VOCABULARY, (5 + 3 * at,), generator=draw).tolist(), 0] for at in range(number)]


def packed(packs: list[list[list[int]]]) -> Dataset:
    return Dataset.from_list(
        [
            {
                "input_ids": [token for ids in pack for token in ids],
                "labels": [label for ids in pack for label in (-100, *ids[1:])],
                "seq_lengths": [len(ids) for ids in pack],
            }
            for pack in packs
        ]
    )


def test_packed_documents_do_not_see_each_other(base: Path, tokenizer: Path, tmp_path: Path) -> None:
    words, losses = AutoTokenizer.from_pretrained(tokenizer), []
    first, second, third = documents(5, 3)
    # The base's own dropout would draw other numbers for other shapes.
    still = tmp_path / "still"
    still.mkdir()
    write_json(still / "base.json", {"kind": "scratch"})
    dropouts = {f"{part}_pdrop": 0.0 for part in ("attn", "embd", "resid")}
    write_json(still / "config.json", {**read_json(base / "config.json"), **dropouts})
    (still / "model.safetensors").hardlink_to(base / "model.safetensors")
    for name, packs in (("packed", [[first, second], [third]]), ("alone", [[first], [second], [third]])):
        use = make_settings(
            quantization=PLAIN, epochs=1, lora=lora(), batch_rows=len(packs), micro_batch_rows=len(packs)
        )
        _, entries = train(still, words, tmp_path / name, tmp_path / f"{name}-adapter", use, rows=packed(packs))
        losses.append(entries[0]["train_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.fixture(scope="module")
def merged(base: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained with `<|pad|>`, which no row has, merged and proven as the stages do; with its tokenizer."""
    folder, extension = tmp_path_factory.mktemp("merged"), read_extension(tokenizer)
    words = AutoTokenizer.from_pretrained(tokenizer)
    use = make_settings(quantization=PLAIN, epochs=2, lora=lora(), learning_rate=0.003)
    rows = packed([documents(at, 2) for at in range(6)])
    run, adapter = (tmp_path_factory.mktemp(name) for name in ("run", "adapter"))
    model, entries = train(base, words, run, adapter, use, rows=rows, extension=extension)
    assert entries[-1]["train_loss"] < entries[0]["train_loss"]
    # In tied tables each step moves the row as an output: away from an answer that is never right.
    assert unmoved_tokens(model) == 0
    counts = merge_shards(base, adapter, folder, "float32", extension.ids)
    assert counts == {"tensors": LAYERS * 12 + 4, "changed_tensors": LAYERS * 4 + 1, "new_tokens": 1}
    assert read_json(adapter / "adapter_config.json")["trainable_token_indices"] == {"transformer.wte": [PAD]}
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((tokenizer / name).read_bytes())
    tuned, ids = attach_adapter(load_extended(base, extension, None, torch.float32, CPU), adapter), [0, 9, PAD, 8, PAD]
    assert difference(tuned, reload(folder), ids) < 1e-5
    return folder


def test_the_added_row_is_merged_into_the_tied_table(base: Path, merged: Path) -> None:
    old, new = (load_file(folder / "model.safetensors")["wte.weight"] for folder in (base, merged))
    assert (old.shape, new.shape) == ((VOCABULARY, WIDTH), (VOCABULARY + 1, WIDTH))
    assert torch.equal(new[:VOCABULARY], old)
    model = reload(merged)
    assert model.config.vocab_size == VOCABULARY + 1
    assert model.lm_head.weight is model.transformer.wte.weight


class HalfPrecision(torch.nn.Module):
    """An activation as llama.cpp's CPU code computes GELU: from a table, with argument and value in float16."""

    def __init__(self, exact: torch.nn.Module) -> None:
        super().__init__()
        self.exact = exact

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.exact(values.half().float()).half().float()


def test_the_gguf_has_the_same_ids_and_logits(merged: Path, tmp_path: Path) -> None:
    file = tmp_path / "whole.gguf"
    gguf.convert(merged, file, "f32", "tiny")
    served, words = gguf.load(file, 64, 1), AutoTokenizer.from_pretrained(merged)
    for text in [*TEXTS, "<|endoftext|>a<|pad|>b"]:
        expected = words(text, add_special_tokens=False).input_ids
        assert served.tokenize(text.encode(), add_bos=False, special=True) == expected
    facts = read_facts(served, file)
    assert (facts.bos_token, facts.eos_token, facts.add_bos) == ("<|endoftext|>", "<|endoftext|>", False)
    assert facts.context_tokens == POSITIONS
    assert served.metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert served.metadata["tokenizer.ggml.padding_token_id"] == str(PAD)

    ids, model = [0, *words(TEXTS[0]).input_ids, PAD], reload(merged)
    obtained = gguf.llama_logits(served)(ids)
    assert obtained.shape == (len(ids), VOCABULARY + 1)
    assert float((model_logits(model)(ids) - obtained).abs().max()) < 1e-3
    for block in model.transformer.h:
        block.mlp.act = HalfPrecision(block.mlp.act)
    assert float((model_logits(model)(ids) - obtained).abs().max()) < 1e-4
