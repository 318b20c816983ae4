"""Tiny models of every kind of attention that is offered or refused."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
# Three layers: Gemma 3 has a window in the first two, the others in all or none; windows are shorter than documents.
MODELS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "gpt2": GPT2Config(
        vocab_size=32, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.0, initializer_range=0.2
    ),
    "gemma": GemmaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=4),
    "gemma3": Gemma3TextConfig(
        **SIZES,
        sliding_window=4,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    "gemma2": Gemma2Config(
        **SIZES,
        sliding_window=4,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}
