"""test rows -> prompts, and a model's greedy answers to them."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from finetune.errors import DataError
from finetune.log import progress


@dataclass(frozen=True)
class Answer:
    """A generated answer: its ids without the token that ended it, and their text."""

    ids: tuple[int, ...]
    text: str


def prompt_ids(row: Mapping[str, Any]) -> list[int]:
    """The ids before a row's first trained token: what the model sees before it answers.

    A row that is trained from its first token on (plain text) is prompted with that token alone.
    """
    return list(row["input_ids"][: max(1, row["trained"].index(True))])


def choose_rows(rows: Iterable[Mapping[str, Any]], per_source: int) -> list[Mapping[str, Any]]:
    """The first rows of each source by record id, a hash: a sample that is stable when other records come or go.

    Sources in alphabetical order. Holds no more rows than it returns.
    """
    chosen: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if any(row["trained"][1:]):
            insort(chosen.setdefault(row["source"], []), row, key=lambda each: str(each["id"]))
            del chosen[row["source"]][per_source:]
    return [row for _, rows_of_source in sorted(chosen.items()) for row in rows_of_source]


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of ids with that of special tokens, which may mark a tool call."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def first_answer_ids(row: Mapping[str, Any], *ends: int | None) -> list[int]:
    """The row's own first answer: its first unbroken run of trained tokens, without the token that ends it."""
    start, trained = len(prompt_ids(row)), row["trained"]
    end = next((at for at in range(start, len(trained)) if not trained[at]), len(trained))
    return without_end(row["input_ids"][start:end], *ends)


def without_end(ids: Sequence[int], *ends: int | None) -> list[int]:
    """The ids up to the first of the tokens `ends`."""
    return list(takewhile(lambda index: index not in ends, ids))


@torch.inference_mode()
def answer(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: Mapping[str, Any]) -> Answer:
    """The model's greedy continuation of {prompt_ids, max_new_tokens, stop_ids}; it ends where its positions do.

    Raises DataError when the prompt alone fills them.
    """
    ids = prompt["prompt_ids"]
    room = model.config.max_position_embeddings - len(ids)
    if room < 1:
        raise DataError(
            f"a prompt of {len(ids)} tokens leaves no room for an answer in {len(ids) + room} positions",
            f"evaluate, task {prompt['task']}",
            "leave that set out of evaluate.tool_calls.sets, or shorten its functions",
        )
    batch = torch.tensor([ids], device=model.device)
    output = model.generate(
        input_ids=batch,
        attention_mask=torch.ones_like(batch),
        do_sample=False,
        # A base's generation_config.json may set these; a GGUF's greedy answer has neither.
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=min(prompt["max_new_tokens"], room),
        eos_token_id=prompt["stop_ids"],
        pad_token_id=tokenizer.pad_token_id,
    )
    made = without_end(output[0, len(ids) :].tolist(), *prompt["stop_ids"])
    return Answer(tuple(made), decode(tokenizer, made))


def answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Mapping[str, Any]], label: str
) -> list[Answer]:
    """The model's greedy answers to prompts; equal ones are answered once.

    One prompt at a time: padding and other shapes of a batch change the last bits of the logits, so that an answer
    would depend on the questions asked beside it.
    """
    keys = [(tuple(prompt["prompt_ids"]), prompt["max_new_tokens"], *prompt["stop_ids"]) for prompt in prompts]
    unique = dict(zip(keys, prompts, strict=True))
    made = {
        key: answer(model, tokenizer, prompt) for key, prompt in progress(unique.items(), len(unique), "answer", label)
    }
    return [made[key] for key in keys]


def base_and_tuned(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Mapping[str, Any]]
) -> dict[str, list[Answer]]:
    """The answers of a PEFT model with its adapter switched off, and on."""
    with model.disable_adapter():
        base = answers(model, tokenizer, prompts, "base answers")
    return {"base": base, "tuned": answers(model, tokenizer, prompts, "tuned answers")}
