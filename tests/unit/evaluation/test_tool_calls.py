from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import DataError
from finetune.evaluation.tasks import score_tasks
from finetune.evaluation.tool_calls import Question, json_schema, read_questions, score_tool_calls
from finetune.io import write_jsonl
from finetune.sections import ToolCallSet

SAMPLE = Path(__file__).parents[3] / "data" / "sample" / "tool_calls"
SIMPLE = ToolCallSet(name="workshop_simple", questions="workshop_simple.jsonl", answers="workshop_simple_answers.jsonl")
IRRELEVANCE = ToolCallSet(name="workshop_irrelevance", questions="workshop_irrelevance.jsonl", answers=None)
HOURS: dict[str, Any] = {
    "name": "get_hours",
    "description": "Opening hours",
    "parameters": {"type": "dict", "properties": {"day": {"type": "string"}}, "required": ["day"]},
}
EXPECTED = {"name": "get_hours", "function": HOURS, "accepted": {"day": ["monday", "lundi"]}}


def call(name: str = "get_hours", **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def figures(questions: list[Question], texts: list[str]) -> dict[str, Any]:
    prompts = [{"task": "tool_calls.x", "expected": question.expected, "reference": ""} for question in questions]
    return score_tasks(prompts, texts)["tool_calls.x"]


def first_accepted(expected: dict[str, Any]) -> str:
    accepted = {key: values[0] for key, values in expected["accepted"].items() if "" not in values}
    return call(expected["name"], **accepted)


def test_perfect_answers_to_the_samples_questions_score_one() -> None:
    questions = read_questions(SAMPLE, SIMPLE, 100)
    assert len(questions) == 8
    perfect = figures(questions, [first_accepted(question.expected or {}) for question in questions])
    assert perfect == {
        "questions": 8,
        "valid_json": 1.0,
        "function_name": 1.0,
        "arguments": 1.0,
        "correct": 1.0,
        "correct_interval": {"low": pytest.approx(0.6755924), "high": 1.0},
    }


WRONG = [
    # (answer, valid, right function, right arguments)
    (call(day="monday"), True, True, True),
    (call(day="LUNDI"), True, True, True),
    (call(day="tuesday"), True, True, False),
    (call(day="monday", hour=9), True, True, False),
    (call(), True, True, False),
    (call("get_price", day="monday"), True, False, True),
    (call("get_price", service="chain"), True, False, False),
    (call(day="monday") + call(day="monday"), True, False, False),
    ('<tool_call>{"name": "get_hours", "arguments": {"day": "monday"}', False, False, False),
    ("Nous sommes fermés le lundi.", False, False, False),
]


def test_known_wrong_answers_score_what_a_hand_counts() -> None:
    assert score_tool_calls([({"expected": EXPECTED}, text) for text, *_ in WRONG]) == {
        "questions": 10,
        "valid_json": 0.8,
        "function_name": 0.5,
        "arguments": 0.3,
        "correct": 0.2,
        "correct_interval": {"low": pytest.approx(0.0566822), "high": pytest.approx(0.5098375)},
    }


@pytest.mark.parametrize(("text", "valid", "named", "fitting"), WRONG)
def test_each_known_answer(text: str, valid: bool, named: bool, fitting: bool) -> None:
    found = score_tool_calls([({"expected": EXPECTED}, text)])
    assert [found[key] for key in ("valid_json", "function_name", "arguments", "correct")] == [
        float(valid),
        float(named),
        float(fitting),
        float(named and fitting),
    ]


def test_restraint_is_neither_a_call_nor_an_attempt_at_one() -> None:
    questions = read_questions(SAMPLE, IRRELEVANCE, 100)
    assert len(questions) == 6
    texts = ["Oui, par chèque.", "", call(day="monday"), "<tool_call>{", "f(x=1)", "[]"]
    found = figures(questions, texts)
    assert (found["questions"], found["restraint"]) == (6, 0.5)
    assert math.isclose(found["restraint_interval"]["low"], 0.1876163, rel_tol=1e-6)
    assert figures(questions, ["Non."] * 6)["restraint"] == 1.0


def test_functions_are_offered_in_the_form_of_the_training_text() -> None:
    question = read_questions(SAMPLE, IRRELEVANCE, 100)[0]
    assert question.id == "workshop_irrelevant_cards"
    assert question.expected is None
    assert question.tools == (
        '[{"type": "function", "function": {"name": "get_hours", "description": "Opening hours of a day", '
        '"parameters": {"type": "object", "properties": {"day": {"type": "string"}}, "required": ["day"]}}}]'
    )


def test_types_of_the_leaderboard_become_those_of_json_schema() -> None:
    schema = {
        "type": "dict",
        "properties": {
            "a": {"type": "float", "description": "a float"},
            "b": {"type": "tuple", "items": {"type": "float"}},
            "c": {"type": "any", "default": "float"},
            "d": {"type": "array", "items": {"type": "dict", "properties": {"type": {"type": "integer"}}}},
        },
        "required": ["a"],
    }
    assert json_schema(schema) == {
        "type": "object",
        "properties": {
            "a": {"type": "number", "description": "a float"},
            "b": {"type": "array", "items": {"type": "number"}},
            "c": {"default": "float"},
            "d": {"type": "array", "items": {"type": "object", "properties": {"type": {"type": "integer"}}}},
        },
        "required": ["a"],
    }
    assert schema["type"] == "dict"


def question_row(**changes: Any) -> dict[str, Any]:
    row = {"id": "q1", "question": [[{"role": "user", "content": "Monday?"}]], "function": [HOURS]}
    return {**row, **changes}


def write_set(folder: Path, question: dict[str, Any], answer: dict[str, Any]) -> ToolCallSet:
    write_jsonl(folder / "q.jsonl", [question])
    write_jsonl(folder / "a.jsonl", [answer])
    return ToolCallSet(name="x", questions="q.jsonl", answers="a.jsonl")


ANSWER: dict[str, Any] = {"id": "q1", "ground_truth": [{"get_hours": {"day": ["monday"]}}]}


@pytest.mark.parametrize(
    ("question", "answer", "what"),
    [
        ({"id": 1}, {}, "a line needs an id of its own"),
        ({"question": [[], []]}, {}, "not a question of one exchange"),
        ({"question": [[{"role": "user"}]]}, {}, "not a question of one exchange"),
        ({"question": [[{"role": "assistant", "content": "a"}]]}, {}, "a question's last turn is the user's"),
        ({"question": [[]]}, {}, "a question's last turn is the user's"),
        ({"question": [[{"role": "bot", "content": "a"}, {"role": "user", "content": "b"}]]}, {}, "the user's"),
        ({"function": [{"name": "f"}]}, {}, "not a question of one exchange"),
        ({"function": [{"name": "f", "parameters": {"type": "HashMap"}}]}, {}, "type 'HashMap' is none of string, any"),
        ({"function": [{"name": "f", "parameters": {"type": "array"}}]}, {}, "of type array has no items"),
        ({}, {"id": "q2"}, "the question has no accepted call"),
        ({}, {"ground_truth": []}, "not one accepted call of a function offered"),
        ({}, {"ground_truth": [{"get_hours": {}}, {"get_hours": {}}]}, "not one accepted call"),
        ({}, {"ground_truth": [{"get_price": {}}]}, "not one accepted call"),
        ({}, {"ground_truth": [{"get_hours": {"day": "monday"}}]}, "accepted values of each parameter of get_hours"),
    ],
)
def test_what_does_not_have_the_leaderboards_form_is_named(
    tmp_path: Path, question: dict[str, Any], answer: dict[str, Any], what: str
) -> None:
    entry = write_set(tmp_path, question_row(**question), {**ANSWER, **answer})
    with pytest.raises(DataError, match=what) as caught:
        read_questions(tmp_path, entry, 5)
    assert str(tmp_path / "q.jsonl") in caught.value.where


def test_broken_lines_missing_files_and_empty_sets_are_named(tmp_path: Path) -> None:
    entry = write_set(tmp_path, question_row(), ANSWER)
    assert [question.id for question in read_questions(tmp_path, entry, 5)] == ["q1"]
    (tmp_path / "a.jsonl").write_text(json.dumps(ANSWER) + "\n{")
    with pytest.raises(DataError, match="not valid JSON") as caught:
        read_questions(tmp_path, entry, 5)
    assert caught.value.where.endswith("a.jsonl:2")
    (tmp_path / "q.jsonl").write_text(f"{json.dumps(question_row())}\n" * 2)
    with pytest.raises(DataError, match="an id of its own") as caught:
        read_questions(tmp_path, entry, 5)
    assert caught.value.where.endswith("q.jsonl:2")
    write_set(tmp_path, question_row(), ANSWER)
    (tmp_path / "q.jsonl").write_text("")
    with pytest.raises(DataError, match="a set without a question"):
        read_questions(tmp_path, entry, 5)
    (tmp_path / "q.jsonl").unlink()
    with pytest.raises(DataError, match="file is missing"):
        read_questions(tmp_path, entry, 5)


def test_fewer_questions_are_chosen_by_their_id_and_not_by_their_place(tmp_path: Path) -> None:
    rows = [question_row(id=f"q{number}") for number in range(20)]
    entry = ToolCallSet(name="x", questions="q.jsonl", answers=None)
    write_jsonl(tmp_path / "q.jsonl", rows)
    chosen = [question.id for question in read_questions(tmp_path, entry, 4)]
    assert chosen == ["q18", "q19", "q4", "q7"]
    write_jsonl(tmp_path / "q.jsonl", rows[::-1])
    assert [question.id for question in read_questions(tmp_path, entry, 4)] == chosen
