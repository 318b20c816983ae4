"""test rows -> prompts, and the models' greedy answers to them, side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from finetune.log import progress


def prompt_ids(row: Mapping[str, Any]) -> list[int]:
    """The ids before a row's first trained token: what the model sees before it answers.

    A row that is trained from its first token on (plain text) is prompted with that token alone.
    """
    return list(row["input_ids"][: max(1, row["trained"].index(True))])


def choose_rows(rows: Iterable[Mapping[str, Any]], per_source: int) -> list[Mapping[str, Any]]:
    """The first rows of each source, in order of record id: stable when other records come or go."""
    chosen: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["source"], row["id"])):
        if any(row["trained"]) and len(chosen.setdefault(row["source"], [])) < per_source:
            chosen[row["source"]].append(row)
    return [row for rows_of_source in chosen.values() for row in rows_of_source]


@torch.inference_mode()
def answer(model: Any, tokenizer: PreTrainedTokenizerBase, ids: list[int], max_new_tokens: int) -> str:
    """The model's greedy continuation of `ids`, without special tokens; it ends where the model's positions do."""
    room = model.config.max_position_embeddings - len(ids)
    if room < 1:
        return ""
    batch = torch.tensor([ids], device=model.device)
    output = model.generate(
        input_ids=batch,
        attention_mask=torch.ones_like(batch),
        do_sample=False,
        max_new_tokens=min(max_new_tokens, room),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    text: str = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
    return text


def answers(model: Any, tokenizer: PreTrainedTokenizerBase, rows: Any, max_new_tokens: int, label: str) -> list[str]:
    """The model's greedy answers to the prompts of `rows`."""
    prompts = [prompt_ids(row) for row in rows]
    return [answer(model, tokenizer, ids, max_new_tokens) for ids in progress(prompts, len(prompts), "answer", label)]


def reference_answer(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """The row's own first answer: its first unbroken run of trained tokens."""
    start = len(prompt_ids(row))
    end = next((at for at in range(start, len(row["trained"])) if not row["trained"][at]), len(row["trained"]))
    text: str = tokenizer.decode(row["input_ids"][start:end], skip_special_tokens=True)
    return text
