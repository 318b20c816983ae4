"""A training text and a chat template -> models/tokenizer and a GGUF that holds the vocabulary alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from finetune.chat_template import SERVING_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, TRAINING_TEMPLATE, serving_form
from finetune.pretokenizer import LLAMA3_PATTERN

SPECIALS = ["<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
CORPUS = ["Bonjour, l'atelier ouvre à 9 h. Hello there, what are your hours? 2026-11-20\n\n  def f(x): return x"] * 4
CONTEXT_TOKENS = 1024
WIDTH = 256


def train_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer, template: str) -> None:
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / TOKENIZER))
    (folder / SERVING_TEMPLATE).write_text(serving_form(template), encoding="utf-8")
    (folder / TRAINING_TEMPLATE).write_text(template, encoding="utf-8")
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "<pad>"}
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(config), encoding="utf-8")


def _weights(answer: int, end: int, vocab_size: int) -> dict[str, np.ndarray]:
    """A Llama whose only layer adds nothing: any token is followed by `answer`, and `answer` by `end`."""
    embedding, output = (np.zeros((vocab_size, WIDTH), np.float32) for _ in range(2))
    embedding[:, 0], output[answer, 0], output[end, 1] = 1, 1, 1
    embedding[answer] = output[end]
    shapes = {"attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH, WIDTH), "attn_v": (WIDTH, WIDTH)}
    shapes |= {"attn_output": (WIDTH, WIDTH), "ffn_gate": (WIDTH, WIDTH), "ffn_up": (WIDTH, WIDTH)}
    shapes |= {"ffn_down": (WIDTH, WIDTH), "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,)}
    layer = {f"blk.0.{name}.weight": np.zeros(shape, np.float32) for name, shape in shapes.items()}
    ends = {"token_embd.weight": embedding, "output.weight": output, "output_norm.weight": np.ones(WIDTH, np.float32)}
    return {**layer, **ends}


def write_gguf(
    path: Path, tokenizer: Tokenizer, template: str, *, add_bos: bool, answer: str = "", turn_end: str = ""
) -> None:
    """Without `answer` the vocabulary alone; with it (one token) also the weights of a model that says it and stops.

    `turn_end`: a token other than eos at which llama.cpp stops too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    writer = GGUFWriter(str(path), "llama")
    writer.add_context_length(CONTEXT_TOKENS)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smaug-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in SPECIALS else TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(tokens.index("<s>"))
    writer.add_eos_token_id(tokens.index("</s>"))
    writer.add_pad_token_id(tokens.index("<pad>"))
    writer.add_add_bos_token(add_bos)
    if turn_end:
        writer.add_eot_token_id(tokens.index(turn_end))
    writer.add_chat_template(template)
    if answer:
        for name, values in _weights(tokens.index(answer), tokens.index("</s>"), len(tokens)).items():
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
