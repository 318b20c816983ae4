"""Fixtures that several kinds of tests share: the pinned CPU code path and a tiny base model."""

from __future__ import annotations

from finetune.runtime import pin_cpu_code_path

pin_cpu_code_path()

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from finetune.io import write_json  # noqa: E402

VOCABULARY = ["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter, words split at spaces: 29 ids."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def make_base(folder: Path, *, tied: bool) -> Path:
    """Write a one-layer Llama in bfloat16, as the base stage does."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    write_json(folder / "base.json", {"kind": "scratch"})
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model with tied embeddings."""
    return make_base(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="session")
def untied_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model with an output layer of its own."""
    return make_base(tmp_path_factory.mktemp("untied"), tied=False)


@pytest.fixture(scope="session")
def conv1d_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 in bfloat16, whose layers hold their weights as [in, out]."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(3)
    shape = {"n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": 29}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=1, eos_token_id=2)).to(torch.bfloat16).save_pretrained(folder)
    write_json(folder / "base.json", {"kind": "scratch"})
    return folder
