"""clean text + tokenizer -> a small Llama, pre-trained for a bounded number of steps: the base of the smoke recipe."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from finetune.errors import DataError
from finetune.log import progress
from finetune.sections import ScratchModel

WARMUP_SHARE = 0.05


def make_llama(shape: ScratchModel, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A randomly initialised Llama of the given shape, in float32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.attention_heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=shape.max_position_tokens,
        tie_word_embeddings=shape.tie_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def to_rows(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, row_tokens: int) -> torch.Tensor:
    """Texts, each between BOS and EOS, joined and cut into rows: int64 [rows, row_tokens]; the tail is left out."""
    stream: list[int] = []
    for text in texts:
        stream += [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        stream.append(tokenizer.eos_token_id)
    rows = len(stream) // row_tokens
    if rows == 0:
        raise DataError(
            f"{len(stream)} tokens of text do not fill one row of {row_tokens}",
            "base.scratch.row_tokens",
            "lower base.scratch.row_tokens in params.yaml, or add text to the sources",
        )
    return torch.tensor(stream[: rows * row_tokens]).view(rows, row_tokens)


def pretrain(model: LlamaForCausalLM, rows: torch.Tensor, shape: ScratchModel, seed: int) -> list[float]:
    """Train on all tokens for `pretrain_steps` steps; returns the loss of each step, in nats per token."""
    generator = torch.Generator().manual_seed(seed)
    # fused: see check_hardware in device.py.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=shape.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    model.train()
    losses = []
    for step in progress(range(shape.pretrain_steps), shape.pretrain_steps, "step", "pretrain"):
        for group in optimizer.param_groups:
            group["lr"] = shape.learning_rate * _schedule(step, shape.pretrain_steps)
        batch = rows[torch.randint(len(rows), (shape.batch_rows,), generator=generator)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    model.eval()
    return losses


def _schedule(step: int, steps: int) -> float:
    warmup = max(1, int(steps * WARMUP_SHARE))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
