from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.errors import DataError
from finetune.evaluation.generation import (
    answer,
    answers,
    choose_rows,
    decode,
    first_answer_ids,
    prompt_ids,
    without_end,
)
from finetune.training.model import load_base

CHAT = {
    "id": "b",
    "source": "chat",
    "input_ids": [1, 3, 4, 5, 2, 6],
    "trained": [False, False, True, True, True, False],
}
TEXT = {"id": "a", "source": "text", "input_ids": [1, 3, 4, 2], "trained": [True, True, True, True]}


def ask(row: dict[str, Any], max_new_tokens: int = 3) -> dict[str, Any]:
    return {"task": "samples", "prompt_ids": prompt_ids(row), "max_new_tokens": max_new_tokens, "stop_ids": [2]}


def test_a_prompt_ends_where_the_first_answer_begins(tiny_tokenizer: Any) -> None:
    assert prompt_ids(CHAT) == [1, 3]
    assert decode(tiny_tokenizer, first_answer_ids(CHAT, 2)) == "b c"


def test_plain_text_is_prompted_with_its_first_token(tiny_tokenizer: Any) -> None:
    assert prompt_ids(TEXT) == [1]
    assert decode(tiny_tokenizer, first_answer_ids(TEXT, 2)) == "a b"


def test_the_end_of_sequence_and_what_follows_are_no_part_of_an_answer(tiny_tokenizer: Any) -> None:
    assert without_end([4, 5, 2, 6, 2], 2) == [4, 5]
    assert without_end([4, 5], 2) == [4, 5]
    assert without_end([4, 5, 6, 2], 2, 6) == [4, 5]
    assert without_end([4, 5], None) == [4, 5]
    # Other special tokens stay: one may mark a tool call.
    assert decode(tiny_tokenizer, [0, 4]) == "<pad> b"


def test_answers_are_the_same_alone_and_beside_others(tiny_base: Path, tiny_tokenizer: Any) -> None:
    model = load_base(tiny_base, None, torch.float32, torch.device("cpu")).eval()
    asked = [ask(CHAT), ask(TEXT), ask(CHAT), ask(CHAT, 5)]
    together = answers(model, tiny_tokenizer, asked, "test")
    alone = [answers(model, tiny_tokenizer, [one], "test")[0] for one in asked]
    assert together == alone
    assert [len(one.ids) for one in together] == [3, 3, 3, 5]
    assert together[3].ids[:3] == together[0].ids
    assert all(decode(tiny_tokenizer, one.ids) == one.text for one in together)


def test_an_answer_ends_at_each_of_its_stops(tiny_base: Path, tiny_tokenizer: Any) -> None:
    model = load_base(tiny_base, None, torch.float32, torch.device("cpu")).eval()
    free = answer(model, tiny_tokenizer, ask(CHAT, 9)).ids
    stopped = answers(model, tiny_tokenizer, [{**ask(CHAT, 9), "stop_ids": [2, free[4]]}, ask(CHAT, 9)], "test")
    assert [each.ids for each in stopped] == [free[: free.index(free[4])], free]


def test_an_answer_ends_where_the_models_positions_do(tiny_base: Path, tiny_tokenizer: Any) -> None:
    model = load_base(tiny_base, None, torch.float32, torch.device("cpu")).eval()
    assert len(answer(model, tiny_tokenizer, {**ask(CHAT, 50), "prompt_ids": [3] * 126}).ids) <= 2
    with pytest.raises(DataError, match="a prompt of 128 tokens leaves no room for an answer in 128 positions"):
        answer(model, tiny_tokenizer, {**ask(CHAT, 50), "prompt_ids": [3] * 128})


def test_rows_are_chosen_by_source_and_id_not_by_order() -> None:
    untrained = {"id": "0", "source": "chat", "input_ids": [1, 3], "trained": [True, False]}
    rows = [TEXT, {**CHAT, "id": "c"}, untrained, CHAT, {**CHAT, "id": "d"}]
    assert [(row["source"], row["id"]) for row in choose_rows(iter(rows), 2)] == [
        ("chat", "b"),
        ("chat", "c"),
        ("text", "a"),
    ]
    assert [row["id"] for row in choose_rows(rows[::-1], 1)] == ["b", "a"]
