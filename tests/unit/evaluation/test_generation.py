from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from finetune.evaluation.generation import answers, choose_rows, prompt_ids, reference_answer
from finetune.training.model import load_base

CHAT = {
    "id": "b",
    "source": "chat",
    "input_ids": [1, 3, 4, 5, 2, 6],
    "trained": [False, False, True, True, True, False],
}
TEXT = {"id": "a", "source": "text", "input_ids": [1, 3, 4, 2], "trained": [True, True, True, True]}


def test_a_prompt_ends_where_the_first_answer_begins(tiny_tokenizer: Any) -> None:
    assert prompt_ids(CHAT) == [1, 3]
    assert reference_answer(CHAT, tiny_tokenizer) == "b c"


def test_plain_text_is_prompted_with_its_first_token(tiny_base: Path, tiny_tokenizer: Any) -> None:
    assert prompt_ids(TEXT) == [1]
    assert reference_answer(TEXT, tiny_tokenizer) == "a b"
    model = load_base(tiny_base, None, torch.float32, torch.device("cpu")).eval()
    first, second = (
        answers(model, tiny_tokenizer, [CHAT, TEXT], 3, "test"),
        answers(model, tiny_tokenizer, [CHAT, TEXT], 3, "test"),
    )
    assert first == second
    assert all(len(text.split()) <= 3 for text in first)


def test_rows_are_chosen_by_source_and_id_not_by_order() -> None:
    untrained = {"id": "0", "source": "chat", "input_ids": [1, 3], "trained": [False, False]}
    rows = [TEXT, {**CHAT, "id": "c"}, untrained, CHAT]
    assert [(row["source"], row["id"]) for row in choose_rows(rows, 1)] == [("chat", "b"), ("text", "a")]
