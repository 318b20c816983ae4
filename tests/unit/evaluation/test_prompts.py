from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_bytes import byte_level_tokenizer
from transformers import PreTrainedTokenizerFast

from finetune.data.record import Record
from finetune.errors import DataError
from finetune.evaluation.prompts import Asker, row_prompts, tool_call_prompts
from finetune.evaluation.tasks import score_tasks
from finetune.sections import Evaluate, ToolCalls, ToolCallSet

SAMPLE = Path(__file__).parents[3] / "data" / "sample" / "tool_calls"


def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level_tokenizer(), bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def asker(**changes: Any) -> Asker:
    content: dict[str, Any] = {
        "samples_per_source": 1,
        "answers_per_task": 2,
        "max_new_tokens": 6,
        "bootstrap_resamples": 100,
        "memorization_tokens": 8,
        "tool_calls": {"folder": str(SAMPLE), "sets": []},
        "style_sources": [],
        "labels": {},
    }
    tool_calls = ToolCalls(**{**content, **changes}["tool_calls"])
    words = tokenizer()
    settings = Evaluate(**{**content, **changes, "tool_calls": tool_calls})
    return Asker(words, [words.convert_tokens_to_ids("</s>")], settings)


def row(source: str, name: str, prompt: str, answer: str) -> dict[str, Any]:
    words = tokenizer()
    before, after = (words.encode(text, add_special_tokens=False) for text in (prompt, answer))
    return {
        "id": name,
        "source": source,
        "group": f"{source}/{name}",
        "input_ids": before + after,
        "trained": [False] * len(before) + [True] * len(after),
    }


TWEETS = [row("tweets", str(number), "<s>Tweet:", f"été {number} au vélo</s>") for number in range(5)]
MOODS = [row("moods", "a", "<s>ah", "Bon.</s>"), row("moods", "b", "<s>oh", "mauvais</s>")]


def test_samples_are_the_first_rows_of_each_source() -> None:
    prompts = row_prompts([*TWEETS[::-1], *MOODS], asker())
    assert [(prompt["task"], prompt["source"], prompt["id"]) for prompt in prompts] == [
        ("samples", "moods", "a"),
        ("samples", "tweets", "0"),
    ]
    assert [prompt["reference"] for prompt in prompts] == ["Bon.", "été 0 au vélo"]
    assert prompts[1]["prompt_ids"] == TWEETS[0]["input_ids"][:7]
    assert prompts[1]["max_new_tokens"] == 6


def test_a_style_prompt_ends_with_the_answers_first_words_and_is_compared_with_another_row() -> None:
    prompts = [prompt for prompt in row_prompts(TWEETS, asker(style_sources=["tweets"])) if prompt["expected"]]
    assert [(prompt["task"], prompt["id"]) for prompt in prompts] == [("style.tweets", "0"), ("style.tweets", "1")]
    # A token is a byte: the opening has 4 at most and the answer goes on for 6, the other text has 10.
    assert prompts[0]["expected"] == {"opening": "ét", "other": "été 2 au"}
    assert prompts[0]["reference"] == "é 0 a"
    assert prompts[0]["prompt_ids"] == TWEETS[0]["input_ids"][: 7 + 3]
    figures = score_tasks(prompts, [prompt["reference"] for prompt in prompts])["style.tweets"]
    assert (figures["answers"], figures["mean_characters"]) == (2, 7)


def test_an_opening_never_ends_within_a_character() -> None:
    rows = [row("tweets", str(number), "<s>x", "aéé€!</s>") for number in range(2)]
    (prompt,) = [each for each in row_prompts(rows, asker(style_sources=["tweets"])) if each["expected"]]
    assert prompt["expected"]["opening"] == "aé"
    short = [row("tweets", str(number), "<s>x", "é</s>") for number in range(2)]
    (prompt,) = [each for each in row_prompts(short, asker(style_sources=["tweets"])) if each["expected"]]
    assert (prompt["expected"]["opening"], prompt["reference"]) == ("", "é")


def test_labels_are_asked_as_the_rows_ask_them() -> None:
    asked = row_prompts(MOODS, asker(labels={"moods": ["bon", "mauvais"]}))
    prompts = [prompt for prompt in asked if prompt["task"] == "labels.moods"]
    assert [prompt["reference"] for prompt in prompts] == ["Bon.", "mauvais"]
    assert score_tasks(prompts, ["bon", "bon"])["labels.moods"]["accuracy"] == 0.5


@pytest.mark.parametrize(
    ("changes", "what", "where"),
    [
        (
            {"style_sources": ["moods"]},
            "style needs two held-out rows at least, the source moods has 1",
            "style_sources",
        ),
        ({"labels": {"other": ["a", "b"]}}, "the source other has labels and no held-out row", "evaluate.labels.other"),
        ({"labels": {"moods": ["a", "b"]}}, "'Bon.' of row a is none of a, b", "evaluate.labels.moods"),
    ],
)
def test_sources_without_what_a_task_needs_are_named(changes: dict[str, Any], what: str, where: str) -> None:
    with pytest.raises(DataError, match=what) as caught:
        row_prompts(MOODS[:1], asker(**changes))
    assert where in caught.value.where


def test_tool_call_prompts_come_from_what_the_renderer_makes_of_the_question() -> None:
    sets = [
        ToolCallSet(name="simple", questions="workshop_simple.jsonl", answers="workshop_simple_answers.jsonl"),
        ToolCallSet(name="none", questions="workshop_irrelevance.jsonl", answers=None),
    ]
    seen: list[Record] = []

    def ids_of(record: Record) -> list[int]:
        seen.append(record)
        return [len(seen)]

    prompts = list(tool_call_prompts(asker(tool_calls={"folder": str(SAMPLE), "sets": sets}), ids_of))
    assert [prompt["task"] for prompt in prompts] == ["tool_calls.simple"] * 2 + ["tool_calls.none"] * 2
    assert [prompt["prompt_ids"] for prompt in prompts] == [[1], [2], [3], [4]]
    assert seen[0].messages[-1].role == "user"
    assert seen[0].tools is not None
    assert prompts[0]["expected"]["name"] in prompts[0]["reference"]
    assert (prompts[2]["expected"], prompts[2]["reference"]) == (None, "")
