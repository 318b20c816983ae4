"""A tiny GPT-2 laid out as openai-community/gpt2 is, and its tokenizer with the added token `<|pad|>`."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel

from finetune.data.vocabulary.extension import extend
from finetune.data_sections import NewToken
from finetune.io import write_json

LAYERS, WIDTH, POSITIONS, VOCABULARY = 2, 256, 128, 300
TEXTS = ["L'été, 1234 vélos à réparer !", "it's  two\n\n\tlines", "日本 🙂 ok", "don't we'll 99999", " spaces   here "]

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"


def write_tokenizer(folder: Path) -> Path:
    """A byte-level tokenizer that splits as GPT-2's does, extended as the tokenizer stage extends one."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    words.train_from_iterator(TEXTS * 20, trainer)
    words.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **named})
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    extend(folder, [NewToken(text="<|pad|>", place="add", reserved=None)], [], VOCABULARY)
    return folder


def write_base(folder: Path) -> Path:
    """Tensors named without `transformer.`, a causal mask beside the weights of each layer, and biases in use."""
    torch.manual_seed(7)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=4,
        n_positions=POSITIONS,
        n_ctx=POSITIONS,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    saved = load_file(folder / "model.safetensors")
    stored = {name.removeprefix("transformer."): tensor for name, tensor in saved.items()}
    mask = torch.ones(POSITIONS, POSITIONS).tril()[None, None]
    stored |= {f"h.{layer}.attn.bias": mask.clone() for layer in range(LAYERS)}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "base.json", {"kind": "scratch"})
    return folder
