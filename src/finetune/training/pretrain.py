"""clean text + tokenizer -> a small Llama, pre-trained for a bounded number of steps: the base of the smoke recipe."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from finetune.data.record import Record
from finetune.errors import DataError
from finetune.log import progress
from finetune.sections import ScratchModel

WARMUP_SHARE = 0.05
# More than a token of French or English has in a large vocabulary; a small one makes more tokens of the same text.
BYTES_PER_TOKEN = 5
BUCKETS = 1 << 16
TEXTS_PER_CALL = 256


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


def choose_texts(read: Callable[[], Iterable[Record]], tokens: int) -> Iterator[str]:
    """The texts of as many records as make `tokens` tokens, in the order read; of all records where they are fewer.

    `read` is called twice. Records are chosen by the hash of their id, whatever their order, source and number: the
    first pass adds up bytes by hash, the second yields the records below the hash at which there are enough.
    """
    sizes_bytes = np.zeros(BUCKETS, dtype=np.int64)
    for record in read():
        sizes_bytes[_bucket(record)] += len(record.all_text().encode("utf-8"))
    last = int(np.searchsorted(sizes_bytes.cumsum(), tokens * BYTES_PER_TOKEN))
    return (record.all_text() for record in read() if _bucket(record) <= last)


def _bucket(record: Record) -> int:
    return int.from_bytes(hashlib.sha256(record.id.encode("utf-8")).digest()[:2], "big")


def to_rows(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, row_tokens: int, folder: Path) -> torch.Tensor:
    """Texts, each between BOS and EOS, joined and cut into rows: int32 [rows, row_tokens]; the tail is left out.

    The ids lie in a nameless file on the disk of `folder`, mapped into memory: some recipes need 650 million of them.
    """
    tokens, left = 0, iter(texts)
    with TemporaryFile(dir=folder) as file:
        while some := list(islice(left, TEXTS_PER_CALL)):
            stream = array("i")
            # A web page that spells `</s>` does not end a document.
            plain = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
            for ids in tokenizer(some, **plain)["input_ids"]:
                stream.extend((tokenizer.bos_token_id, *ids, tokenizer.eos_token_id))
            stream.tofile(file)
            tokens += len(stream)
        if tokens < row_tokens:
            raise DataError(
                f"{tokens} tokens of text do not fill one row of {row_tokens}",
                "base.scratch.row_tokens",
                "lower base.scratch.row_tokens in params.yaml, or add text to the sources",
            )
        file.flush()
        # Copy on write: torch wants memory that it could write to.
        rows = np.memmap(file, dtype=np.int32, mode="c", shape=(tokens // row_tokens, row_tokens))
    return torch.from_numpy(rows)


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
        batch = rows[torch.randint(len(rows), (shape.batch_rows,), generator=generator)].long().to(model.device)
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
