"""Conversion and quantisation by the real llama.cpp, on a small Llama with a byte-level BPE trained here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from finetune.errors import ExportError
from finetune.evaluation.perplexity import compare, model_logits
from finetune.export import gguf
from finetune.export.converter import LLAMA3_PATTERN, splitting_rule
from finetune.sections import QuantizedType, QuantizeGguf

TEXTS = ["L'été, 1234 vélos à réparer !", "it's  two\n\n\tlines", "日本 🙂‍↔️ ok", "don't we'll 99999", " spaces   here "]


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "<s>", "</s>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = "{{ bos_token }}"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(merged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    gguf.convert(merged, file, "f32", "tiny")
    return file


def test_token_ids_of_hostile_text_are_equal(merged: Path, whole: Path) -> None:
    ours = PreTrainedTokenizerFast.from_pretrained(merged)
    theirs = llama_cpp.Llama(str(whole), vocab_only=True, verbose=False)
    for text in TEXTS:
        assert (
            theirs.tokenize(text.encode(), add_bos=False, special=True)
            == ours(text, add_special_tokens=False).input_ids
        )


def test_float32_logits_are_equal_within_one_in_ten_thousand(merged: Path, whole: Path) -> None:
    ids = PreTrainedTokenizerFast.from_pretrained(merged)(TEXTS[0]).input_ids
    expected = model_logits(LlamaForCausalLM.from_pretrained(merged).eval())(ids)
    obtained = gguf.llama_logits(gguf.load(whole, 64, 1))(ids)
    assert float((expected - obtained).abs().max()) < 1e-4


def test_types_are_real_and_lose_more_the_smaller_they_are(merged: Path, whole: Path, tmp_path: Path) -> None:
    ids = PreTrainedTokenizerFast.from_pretrained(merged)(TEXTS[0]).input_ids
    reference = model_logits(LlamaForCausalLM.from_pretrained(merged).eval())(ids)
    losses, sizes = [], []
    for name in ("F16", "Q8_0", "Q4_K_M"):
        file = tmp_path / f"{name}.gguf"
        gguf.quantize(whole, file, name, 1)
        logits = gguf.llama_logits(gguf.load(file, 64, 1))(ids)
        losses.append(compare(reference, logits, ids, [True] * len(ids)).summary()["mean_kl"])
        sizes.append(file.stat().st_size)
    assert losses == sorted(losses)
    assert sizes == sorted(sizes, reverse=True)
    assert gguf.tensor_types(tmp_path / "Q4_K_M.gguf") == {"F32": 5, "Q4_K": 12, "Q6_K": 3}
    assert gguf.tensor_types(tmp_path / "Q8_0.gguf") == {"F32": 5, "Q8_0": 15}


def test_equal_input_gives_equal_bytes(merged: Path, whole: Path, tmp_path: Path) -> None:
    gguf.convert(merged, tmp_path / "again.gguf", "f32", "tiny")
    assert (tmp_path / "again.gguf").read_bytes() == whole.read_bytes()
    for threads in (1, 2):
        gguf.quantize(whole, tmp_path / f"{threads}.gguf", "Q4_K_M", threads)
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "2.gguf").read_bytes()


def test_a_damaged_source_leaves_no_target(tmp_path: Path) -> None:
    source = tmp_path / "source.gguf"
    source.write_bytes(b"GGUF and then nothing")
    with pytest.raises(ExportError, match=r"finetune\.export\.quantizer ended with code"):
        gguf.quantize(source, tmp_path / "target.gguf", "Q8_0", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.gguf"]


def test_a_missing_converter_says_make_setup(merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_TOOLS", str(tmp_path))
    with pytest.raises(ExportError, match="make setup"):
        gguf.convert(merged, tmp_path / "x.gguf", "f32", "tiny")


def test_a_type_over_its_budget_fails_the_run() -> None:
    types = [
        QuantizedType(type="Q8_0", max_perplexity_ratio=1.01),
        QuantizedType(type="Q4_K_M", max_perplexity_ratio=1.1),
    ]
    measured = {"Q8_0": {"perplexity_ratio": 1.01}, "Q4_K_M": {"perplexity_ratio": 1.1}}
    gguf.check_budgets(QuantizeGguf(types=types), measured)
    measured["Q4_K_M"]["perplexity_ratio"] = 1.1001
    with pytest.raises(ExportError, match=r"Q4_K_M raises perplexity by a factor of 1\.1001, more than 1\.1"):
        gguf.check_budgets(QuantizeGguf(types=types), measured)


def test_too_small_a_disk_is_refused(tmp_path: Path) -> None:
    gguf.check_disk(1_000_000, 16, ["Q8_0"], tmp_path)
    with pytest.raises(ExportError, match=r"the GGUF files need about [\d,]+ bytes, and [\d,]+ are free"):
        gguf.check_disk(10**15, 16, ["Q8_0", "Q4_K_M"], tmp_path)


@pytest.mark.parametrize(
    ("steps", "ignore_merges", "expected"),
    [
        ([("Split", LLAMA3_PATTERN), ("ByteLevel", None)], False, "smaug-bpe"),
        ([("Split", LLAMA3_PATTERN), ("ByteLevel", None)], True, "llama-bpe"),
        ([("Split", LLAMA3_PATTERN.replace("{1,3}", "")), ("ByteLevel", None)], False, "qwen2"),
    ],
)
def test_the_splitting_rule_is_read_from_the_structure(
    steps: list[Any], ignore_merges: bool, expected: str, tmp_path: Path
) -> None:
    content = {
        "pre_tokenizer": {"pretokenizers": [{"type": kind, "pattern": {"Regex": rule}} for kind, rule in steps]},
        "model": {"ignore_merges": ignore_merges},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert splitting_rule(tmp_path / "tokenizer.json") == expected


def test_an_unknown_splitting_rule_is_refused(tmp_path: Path) -> None:
    content = {"pre_tokenizer": {"type": "Whitespace"}, "model": {"ignore_merges": False}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ExportError, match=r"no splitting rule like this tokenizer's: \['Whitespace'\]"):
        splitting_rule(tmp_path / "tokenizer.json")
