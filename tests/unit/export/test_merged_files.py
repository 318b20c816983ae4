from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import GenerationConfig, LlamaForCausalLM

from finetune.errors import ExportError
from finetune.export.merge import merge_shards, reload
from finetune.export.merged_files import write_config, write_tokenizer
from finetune.io import read_json, write_json

# 0 <pad>, 1 <s>, 2 </s>, 3 <|end|>, 4 a
TOKENS = ["<pad>", "<s>", "</s>", "<|end|>", "a"]
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}STOP\n{% endfor %}"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "merged"
    write_json(folder / "config.json", {"eos_token_id": 2, "pad_token_id": None})
    return folder


def write_words(folder: Path, stop: str = "<|end|>", **named: str) -> Path:
    words = Tokenizer(models.WordLevel({token: index for index, token in enumerate(TOKENS)}, unk_token="<pad>"))
    words.add_special_tokens(TOKENS[:4])
    folder.mkdir()
    words.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {**NAMED, **named})
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("STOP", stop))
    (folder / "training_template.jinja").write_text("trained")
    write_json(folder / "extension.json", {})
    return folder


def generation_of(tmp_path: Path, target: Path, held: dict[str, Any] | None, **words: str) -> dict[str, Any]:
    base = tmp_path / "base"
    base.mkdir()
    if held is not None:
        write_json(base / "generation_config.json", held)
    write_tokenizer(base, write_words(tmp_path / "words", **words), target, "extension.json")
    content: dict[str, Any] = read_json(target / "generation_config.json")
    # What transformers reads from it, it saves again.
    GenerationConfig.from_pretrained(target).save_pretrained(tmp_path / "again")
    return content


IDS = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0}


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        (None, IDS),
        # Qwen's and others': pad is among the ends, and an answer in a batch is empty (transformers#48016).
        ({"eos_token_id": [0, 2], "pad_token_id": 0, "do_sample": True, "top_k": 20}, {"do_sample": True, "top_k": 20}),
        ({"eos_token_id": 4, "transformers_version": "4.1", "_from_model_config": True}, {"eos_token_id": [2, 3, 4]}),
        # Llama 2's: sampling settings without sampling.
        ({"temperature": 0.9, "top_p": 0.6, "max_length": 4096}, {"max_length": 4096}),
        ({"do_sample": False, "num_return_sequences": 4, "repetition_penalty": 1.1}, {}),
    ],
    ids=["none", "pad", "more", "sampling", "unsaveable"],
)
def test_generation_ends_at_the_turns_end_and_never_at_pad(
    held: dict[str, Any] | None, expected: dict[str, Any], tmp_path: Path, target: Path
) -> None:
    assert generation_of(tmp_path, target, held) == {**IDS, **expected}
    assert read_json(target / "config.json") == {"eos_token_id": 2, "pad_token_id": 0}


@pytest.mark.parametrize("stop", ["</s>", "a", ""])
def test_a_turn_that_ends_at_eos_or_at_no_token_adds_no_end(stop: str, tmp_path: Path, target: Path) -> None:
    assert generation_of(tmp_path, target, None, stop=stop)["eos_token_id"] == [2]


def test_a_pad_that_the_config_took_for_an_end_is_one_no_more(tmp_path: Path, target: Path) -> None:
    write_json(target / "config.json", {"eos_token_id": [0, 4]})
    generation_of(tmp_path, target, None)
    assert read_json(target / "config.json") == {"eos_token_id": [4, 2], "pad_token_id": 0}


def test_a_pad_that_is_eos_is_refused(tmp_path: Path, target: Path) -> None:
    with pytest.raises(ExportError, match=r"'</s>' is both the end and the padding"):
        generation_of(tmp_path, target, None, pad_token="</s>")


def test_the_sentencepiece_model_comes_with_the_tokenizer(tmp_path: Path, target: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/tokenizer.model").write_bytes(b"pieces")
    write_tokenizer(tmp_path / "base", write_words(tmp_path / "words"), target, "extension.json")
    assert (target / "tokenizer.model").read_bytes() == b"pieces"
    names = {"chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model"}
    assert {file.name for file in target.iterdir()} == names | {"tokenizer_config.json"}


def test_the_config_says_what_the_files_hold(tmp_path: Path) -> None:
    held = {
        "model_type": "any",
        "torch_dtype": "float16",
        "vocab_size": 5,
        "auto_map": {"AutoModel": "evil.Model"},
        "text_config": {"torch_dtype": "float16", "dtype": "float16", "vocab_size": 5, "hidden_size": 4},
        "vision_config": {"hidden_size": 4},
    }
    write_json(tmp_path / "base/config.json", held)
    write_config(tmp_path / "base", tmp_path, "bfloat16", 7, tied=False)
    assert read_json(tmp_path / "config.json") == {
        "model_type": "any",
        "dtype": "bfloat16",
        "vocab_size": 7,
        "tie_word_embeddings": False,
        "text_config": {"dtype": "bfloat16", "vocab_size": 7, "hidden_size": 4},
        "vision_config": {"hidden_size": 4},
    }


def test_the_index_names_every_tensor_and_the_size_of_all(untied_base: Path, tmp_path: Path) -> None:
    base, target = tmp_path / "base", tmp_path / "merged"
    model = LlamaForCausalLM.from_pretrained(untied_base, dtype=torch.bfloat16)
    model.save_pretrained(base, max_shard_size="20KB")
    adapter = tmp_path / "adapter"
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(adapter)
    merge_shards(base, adapter, target, "float32", [])
    files = {file.name: load_file(file) for file in sorted(target.glob("*.safetensors"))}
    assert len(files) == 6
    index = read_json(target / "model.safetensors.index.json")
    assert index["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
    # 29 x 64 values of two tables, 3 norms of 64, the seven linear layers; 4 bytes each.
    linear = 64 * 64 * 2 + 32 * 64 * 2 + 64 * 128 * 3
    assert index["metadata"] == {"total_size": 4 * (2 * 29 * 64 + 3 * 64 + linear)}
    assert reload(target, torch.float32).config.dtype == torch.float32
