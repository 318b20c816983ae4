"""Small random checkpoints of the architectures that the export supports, each with a tokenizer of its family."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from gguf import GGUFWriter, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto import AutoModelForCausalLM

from finetune.export.tokenizer_structure import QWEN35_PATTERN
from finetune.pretokenizer import LLAMA3_PATTERN, QWEN2_PATTERN

SPECIALS = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|done|>"]
CORPUS = [
    "Bonjour, l'atelier ouvre à 9 h 30 ; la réparation d'une roue voilée coûte 12,50 €.",
    "Hello there, what are your hours? I'll be there at 10:45, don't wait.",
    "def f(x):\n    return {'a': [x ** 2, 0x1F, 1e-6]}  # 100%\n\n\n\tdone",
    "営業時間は何時ですか。工作坊几点开门？ Привет, как дела 123456",
    "2026 2026 2026 12 34 12 34 1234 1234 हिन्दी हिन्दी नमस्ते नमस्ते दुनिया",
] * 8
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{{ '<|done|>' if message.role == 'assistant' }}{% endfor %}{{ '<|assistant|>' if add_generation_prompt }}"
)
SIZES: dict[str, Any] = {
    "vocab_size": 768,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def split_by(pattern: str) -> pre_tokenizers.Sequence:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


def digits_then_words() -> pre_tokenizers.Sequence:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])


# llama.cpp's name for each way of splitting, and whether whole words skip the merges.
RULES: dict[str, tuple[Callable[[], Any], bool]] = {
    "smaug-bpe": (lambda: split_by(LLAMA3_PATTERN), False),
    "llama-bpe": (lambda: split_by(LLAMA3_PATTERN), True),
    "qwen2": (lambda: split_by(QWEN2_PATTERN), False),
    "qwen35": (lambda: split_by(QWEN35_PATTERN), False),
    "gpt-2": (lambda: pre_tokenizers.ByteLevel(add_prefix_space=False), False),
    "smollm": (digits_then_words, False),
}


def write_byte_level(folder: Path, rule: str, *, add_bos: bool = False) -> None:
    """A byte-level BPE of 700 tokens that splits by `rule`; with `add_bos` its post-processor adds <s>."""
    pre_tokenizer, ignore_merges = RULES[rule]
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer(), decoders.ByteLevel()
    if rule.startswith("qwen"):
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    write_tokenizer(folder, tokenizer)


def write_tokenizer(folder: Path, tokenizer: Tokenizer, template: str = TEMPLATE) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": None}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def train_sentencepiece(prefix: Path, *, dummy_prefix: bool) -> None:
    """A SentencePiece BPE with byte fallback, no normalisation and one digit a token, as Llama 2's and Gemma's."""
    trainer = sentencepiece.SentencePieceTrainer
    trainer.train(
        sentence_iterator=iter(line for text in CORPUS for line in text.splitlines() if line),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=540,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        add_dummy_prefix=dummy_prefix,
        character_coverage=0.98,
        num_threads=1,
        minloglevel=2,
        unk_id=3,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        pad_piece="<pad>",
    )


# Where a tokenizer.json marks a space: Llama 2 and Phi-3; Mistral 0.3 and what transformers 5 writes; Gemma.
SPACES = ("every piece", "beginning", "nowhere")


def write_sentencepiece(folder: Path, spaces: str, *, rstrip: bool = False) -> None:
    """tokenizer.model, and the tokenizer.json that transformers makes of it, with four added tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    train_sentencepiece(folder / "made", dummy_prefix=spaces != "nowhere")
    (folder / "made.model").replace(folder / "tokenizer.model")
    (folder / "made.vocab").unlink()
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    pieces = {processor.id_to_piece(number): number for number in range(processor.vocab_size())}
    # A piece can be made from any two pieces that join to it; the better its score, the earlier.
    pairs = [
        (number, pieces[text[:cut]], pieces[text[cut:]], text[:cut], text[cut:])
        for text, number in pieces.items()
        if not processor.is_byte(number) and not processor.is_control(number) and not processor.is_unknown(number)
        for cut in range(1, len(text))
        if text[:cut] in pieces and text[cut:] in pieces
    ]
    merges = [(left, right) for *_, left, right in sorted(pairs)]
    tokenizer = Tokenizer(models.BPE(pieces, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if spaces == "every piece":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif spaces == "beginning":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<s>", "<unk>")])
    # Phi-3's strip the white space after them.
    stripping = ("<pad>", "</s>", *SPECIALS[3:])
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False, rstrip=rstrip) for text in stripping]
    )
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False, rstrip=rstrip)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    write_tokenizer(folder, tokenizer)


# Architecture -> its configuration, and the writer of a tokenizer of its family.
ARCHITECTURES: dict[str, tuple[Callable[[], PreTrainedConfig], Callable[[Path], None]]] = {
    "LlamaForCausalLM": (
        lambda: LlamaConfig(
            **SIZES,
            tie_word_embeddings=True,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        ),
        lambda folder: write_byte_level(folder, "llama-bpe", add_bos=True),
    ),
    "MistralForCausalLM": (
        lambda: MistralConfig(**SIZES, sliding_window=None),
        lambda folder: write_sentencepiece(folder, "beginning"),
    ),
    "Qwen2ForCausalLM": (lambda: Qwen2Config(**SIZES), lambda folder: write_byte_level(folder, "qwen2")),
    "Qwen3ForCausalLM": (
        lambda: Qwen3Config(**SIZES, head_dim=128, tie_word_embeddings=True),
        lambda folder: write_byte_level(folder, "qwen2"),
    ),
    "GemmaForCausalLM": (
        lambda: GemmaConfig(**SIZES, head_dim=64),
        lambda folder: write_sentencepiece(folder, "nowhere"),
    ),
    "Gemma2ForCausalLM": (
        lambda: Gemma2Config(**SIZES, head_dim=64, query_pre_attn_scalar=64, sliding_window=16),
        lambda folder: write_sentencepiece(folder, "nowhere"),
    ),
    "Gemma3ForCausalLM": (
        lambda: Gemma3TextConfig(**SIZES, head_dim=64, query_pre_attn_scalar=64, sliding_window=16),
        lambda folder: write_sentencepiece(folder, "nowhere"),
    ),
    "Phi3ForCausalLM": (
        lambda: Phi3Config(**SIZES, original_max_position_embeddings=256),
        lambda folder: write_sentencepiece(folder, "every piece", rstrip=True),
    ),
    "GPT2LMHeadModel": (
        lambda: GPT2Config(
            vocab_size=768, n_positions=256, n_embd=256, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
        ),
        lambda folder: write_byte_level(folder, "gpt-2"),
    ),
}


def write_model(folder: Path, architecture: str) -> None:
    """A checkpoint as `merge` leaves one: random weights (norms too), configuration and tokenizer files."""
    config, write = ARCHITECTURES[architecture]
    write(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config())
    for name, values in model.named_parameters():
        if "norm" in name or "ln_" in name:
            values.data += 0.2 * torch.randn_like(values)
    model.save_pretrained(folder)


def write_vocabulary(path: Path, folder: Path, rule: str, **keys: str | int) -> None:
    """A GGUF with the vocabulary of a byte-level BPE alone, and further metadata by key ("__" for ".")."""
    content = json.loads((folder / "tokenizer.json").read_text())
    tokens = sorted(content["model"]["vocab"], key=content["model"]["vocab"].__getitem__)
    added = {token["content"] for token in content["added_tokens"]}
    writer = GGUFWriter(str(path), "llama")
    writer.add_context_length(256)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in added else TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
    writer.add_bos_token_id(tokens.index("<s>"))
    writer.add_eos_token_id(tokens.index("</s>"))
    writer.add_add_bos_token(False)
    for key, value in keys.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(key.replace("__", "."), value)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 32), np.float32))
    writer.add_tensor("output_norm.weight", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
