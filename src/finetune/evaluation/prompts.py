"""test rows and tool-call sets -> the prompts that base, tuned and every GGUF file answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from finetune.data.record import Record, make_record
from finetune.errors import DataError
from finetune.evaluation.generation import choose_rows, decode, first_answer_ids, prompt_ids
from finetune.evaluation.labels import normalize
from finetune.evaluation.tasks import SAMPLES, Prompt
from finetune.evaluation.tool_calls import read_questions
from finetune.sections import Evaluate

Row = Mapping[str, Any]
# Prompts of a style are often all the same text, and a greedy answer to one text is one answer.
OPENING_TOKENS = 4


@dataclass(frozen=True)
class Asker:
    """What all prompts share: the tokenizer, the ids that end an answer, and the section evaluate."""

    tokenizer: PreTrainedTokenizerBase
    stop_ids: list[int]
    settings: Evaluate

    def prompt(self, task: str, row: Row, expected: Any) -> Prompt:
        """A test row's own prompt and first answer."""
        return {
            "task": task,
            "id": row["id"],
            "source": row["source"],
            "prompt_ids": prompt_ids(row),
            "max_new_tokens": self.settings.max_new_tokens,
            "stop_ids": self.stop_ids,
            "expected": expected,
            "reference": self.text(self.answer_ids(row)),
        }

    def answer_ids(self, row: Row) -> list[int]:
        """A test row's first answer without the token that ends it."""
        return first_answer_ids(row, *self.stop_ids)

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return decode(self.tokenizer, ids)


def row_prompts(rows: Iterable[Row], asker: Asker) -> list[Prompt]:
    """Prompts of the tasks that ask from test rows; reads the rows once. Raises DataError for a source without rows."""
    settings = asker.settings
    most = max(settings.samples_per_source, 2 * settings.answers_per_task)
    by_source: dict[str, list[Row]] = {}
    for row in choose_rows(rows, most):
        by_source.setdefault(row["source"], []).append(row)
    prompts = [
        asker.prompt(SAMPLES, row, None) for found in by_source.values() for row in found[: settings.samples_per_source]
    ]
    for source in settings.style_sources:
        prompts += _style_prompts(source, by_source.get(source, []), asker)
    for source, labels in settings.labels.items():
        prompts += _label_prompts(source, by_source.get(source, []), labels, asker)
    return prompts


def tool_call_prompts(asker: Asker, ids_of: Callable[[Record], list[int]]) -> Iterator[Prompt]:
    """Prompts of the tool-call sets; `ids_of` renders a conversation with its functions as the model was trained."""
    settings = asker.settings
    for entry in settings.tool_calls.sets:
        for question in read_questions(Path(settings.tool_calls.folder), entry, settings.answers_per_task):
            record = make_record(source=f"tool_calls.{entry.name}", messages=question.messages, tools=question.tools)
            expected = question.expected
            accepted = "" if expected is None else {expected["name"]: expected["accepted"]}
            yield {
                "task": f"tool_calls.{entry.name}",
                "id": question.id,
                "source": entry.name,
                "prompt_ids": ids_of(record),
                "max_new_tokens": settings.max_new_tokens,
                "stop_ids": asker.stop_ids,
                "expected": expected,
                "reference": json.dumps(accepted, ensure_ascii=False) if accepted else "",
            }


def _style_prompts(source: str, rows: Sequence[Row], asker: Asker) -> Iterator[Prompt]:
    """Each row's prompt with the first words of its answer; half of the rows lend the texts to compare words with.

    `reference` is the answer as far as a model may write it.
    """
    if len(rows) < 2:
        raise DataError(
            f"style needs two held-out rows at least, the source {source} has {len(rows)}",
            "evaluate.style_sources",
            "raise split.test_share, or leave the source out",
        )
    count, longest = min(asker.settings.answers_per_task, len(rows) // 2), asker.settings.max_new_tokens
    for row, other in zip(rows[:count], rows[count : 2 * count], strict=True):
        ids = asker.answer_ids(row)
        opening = _opening_tokens(ids, asker)
        expected = {
            "opening": asker.text(ids[:opening]),
            "other": asker.text(asker.answer_ids(other)[: OPENING_TOKENS + longest]),
        }
        yield {
            **asker.prompt(f"style.{source}", row, expected),
            "prompt_ids": prompt_ids(row) + ids[:opening],
            "reference": asker.text(ids[opening : opening + longest]),
        }


def _opening_tokens(ids: list[int], asker: Asker) -> int:
    """How many ids to give away: an opening that ends within a character could not be joined to a text again."""
    for tokens in range(min(OPENING_TOKENS, len(ids) - 1), 0, -1):
        if asker.text(ids[:tokens]) + asker.text(ids[tokens:]) == asker.text(ids):
            return tokens
    return 0


def _label_prompts(source: str, rows: Sequence[Row], labels: list[str], asker: Asker) -> Iterator[Prompt]:
    if not rows:
        raise DataError(
            f"the source {source} has labels and no held-out row",
            f"evaluate.labels.{source}",
            "raise split.test_share, or leave the source out",
        )
    known = {normalize(label) for label in labels}
    for row in rows[: asker.settings.answers_per_task]:
        prompt = asker.prompt(f"labels.{source}", row, {"labels": labels})
        if normalize(prompt["reference"]) not in known:
            raise DataError(
                f"the held-out answer {prompt['reference'][:60]!r} of row {row['id']} is none of {', '.join(labels)}",
                f"evaluate.labels.{source}",
                "add it to the labels of that source",
            )
        yield prompt
