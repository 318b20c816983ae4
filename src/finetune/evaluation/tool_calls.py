"""files in the Berkeley leaderboard's form -> questions with functions to call; answers -> how many calls are right.

A question is a line {id, question: [[{role, content}...]], function: [{name, description, parameters}]}, its accepted
call a line {id, ground_truth: [{name: {parameter: [accepted values]}}]} of another file; a set without such a file asks
what no function answers. https://github.com/ShishirPatil/gorilla/tree/main/berkeley-function-call-leaderboard
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.record import ROLES, Message
from finetune.errors import DataError
from finetune.evaluation.call_matching import TYPES, arguments_fit
from finetune.evaluation.call_parser import parse_calls
from finetune.evaluation.intervals import share_interval
from finetune.io import sha256_text
from finetune.sections import ToolCallSet

# The leaderboard's own names of types -> JSON Schema's, which chat templates and training data use.
SCHEMA_TYPES = {"dict": "object", "float": "number", "tuple": "array"}
FORM = "write it as the leaderboard does: see data/sample/tool_calls"


@dataclass(frozen=True)
class Question:
    """A conversation that ends in the question, the functions offered, and what the call must be.

    `expected`: {name, function, accepted} of the one right call, None where no function must be called.
    """

    id: str
    messages: tuple[Message, ...]
    tools: str
    expected: dict[str, Any] | None


def read_questions(folder: Path, entry: ToolCallSet, most: int) -> list[Question]:
    """At most `most` questions of a set, the first by the hash of their id: files are often sorted by subject.

    Raises DataError with the file and the line of what does not have the leaderboard's form.
    """
    questions = dict(_lines(folder / entry.questions))
    accepted = dict(_lines(folder / entry.answers)) if entry.answers else None
    chosen = sorted(questions, key=sha256_text)[:most]
    if not chosen:
        raise DataError("a set without a question", folder / entry.questions, FORM)
    return [_question(questions[name], accepted, f"{folder / entry.questions}: {name}") for name in sorted(chosen)]


def score_tool_calls(pairs: Sequence[tuple[Mapping[str, Any], str]]) -> dict[str, Any]:
    """Shares of the questions of one set; `expected` of each prompt as in Question.

    valid_json: every call in the answer can be read, and there is one at least. function_name: there is one call, of
    the right function. arguments: there is one call, and its arguments are those of the right function. correct:
    both. For a set in which no function fits, restraint: no call, nor an attempt at one.
    """
    parsed = [(prompt["expected"], parse_calls(text)) for prompt, text in pairs]
    total = len(parsed)
    if all(expected is None for expected, _ in parsed):
        restrained = sum(not found.calls and found.fault is None for _, found in parsed)
        return {
            "questions": total,
            "restraint": restrained / total,
            "restraint_interval": share_interval(restrained, total),
        }
    single = [(expected, found.calls[0]) for expected, found in parsed if len(found.calls) == 1]
    named = [call.name == expected["name"] for expected, call in single]
    fitting = [arguments_fit(call.arguments, expected["function"], expected["accepted"]) for expected, call in single]
    correct = sum(name and fits for name, fits in zip(named, fitting, strict=True))
    return {
        "questions": total,
        "valid_json": sum(bool(found.calls) for _, found in parsed) / total,
        "function_name": sum(named) / total,
        "arguments": sum(fitting) / total,
        "correct": correct / total,
        "correct_interval": share_interval(correct, total),
    }


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file by their id."""
    if not path.is_file():
        raise DataError("file is missing", path, "correct evaluate.tool_calls, whose paths are relative to its folder")
    seen = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as fault:
            raise DataError(f"not valid JSON: {fault}", f"{path}:{number}", "mend that line") from None
        if not isinstance(row, dict) or not isinstance(row.get("id"), str) or row["id"] in seen:
            raise DataError("a line needs an id of its own, a text", f"{path}:{number}", FORM)
        seen.add(row["id"])
        yield row["id"], row


def _question(row: Mapping[str, Any], accepted: Mapping[str, Any] | None, where: str) -> Question:
    try:
        (turns,) = row["question"]
        messages = tuple(Message(turn["role"], turn["content"]) for turn in turns)
        functions = [{**function, "parameters": json_schema(function["parameters"])} for function in row["function"]]
        known = {function["name"]: function for function in row["function"]}
    except (KeyError, TypeError, ValueError) as fault:
        raise DataError(f"not a question of one exchange with its functions: {fault!r}", where, FORM) from None
    except RecursionError:
        raise DataError("parameters are nested too deeply", where, FORM) from None
    if not messages or messages[-1].role != "user" or any(message.role not in ROLES for message in messages):
        raise DataError("a question's last turn is the user's", where, FORM)
    tools = json.dumps([{"type": "function", "function": function} for function in functions], ensure_ascii=False)
    if accepted is None:
        return Question(row["id"], messages, tools, None)
    if row["id"] not in accepted:
        raise DataError("the question has no accepted call", where, "add a line with its id to the file of answers")
    return Question(row["id"], messages, tools, _expected(accepted[row["id"]], known, where))


def _expected(answer: Mapping[str, Any], functions: Mapping[str, Any], where: str) -> dict[str, Any]:
    try:
        (call,) = answer["ground_truth"]
        ((name, accepted),) = call.items()
        function = functions[name]
        lists = list(accepted.values())
    except (KeyError, TypeError, ValueError, AttributeError) as fault:
        raise DataError(f"not one accepted call of a function offered: {fault!r}", where, FORM) from None
    if not all(isinstance(values, list) for values in lists):
        raise DataError(f"the accepted values of each parameter of {name} are a list", where, FORM)
    return {"name": name, "function": function, "accepted": accepted}


def json_schema(schema: Any) -> Any:
    """A schema with the leaderboard's names of types as JSON Schema's; `any` becomes no type.

    Raises ValueError for a type that neither has, and for a list that does not say what its items are.
    """
    if not isinstance(schema, dict):
        return schema
    kind = schema["type"]
    if kind not in TYPES:
        raise ValueError(f"type {kind!r} is none of {', '.join(TYPES)}")
    if TYPES[kind] is list and "items" not in schema:
        raise ValueError(f"a parameter of type {kind} has no items")
    changed = {key: SCHEMA_TYPES.get(kind, kind) if key == "type" else value for key, value in schema.items()}
    if kind == "any":
        del changed["type"]
    if "properties" in schema:
        changed["properties"] = {name: json_schema(each) for name, each in schema["properties"].items()}
    if "items" in schema:
        changed["items"] = json_schema(schema["items"])
    return changed
