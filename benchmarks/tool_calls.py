"""The verdict on tool calls against the Berkeley leaderboard's own checker: `python benchmarks/tool_calls.py FOLDER`.

FOLDER is an unpacked wheel: `pip download --no-deps bfcl-eval==2026.3.23`, then unzip it there. For each question of
its sets with one Python call, the perfect answer and hundreds of changed ones are judged by both. Writes
tool_calls.json. The leaderboard's program is run, not copied; what it imports for other languages is left out.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from finetune.errors import DataError
from finetune.evaluation.tasks import score_tasks
from finetune.evaluation.tool_calls import Question, read_questions
from finetune.io import write_json
from finetune.sections import ToolCallSet

RESULT = Path(__file__).with_suffix(".json")
SETS = ("simple_python", "multiple", "live_simple", "live_multiple")
RESTRAINT_SETS = ("irrelevance", "live_irrelevance")
ALL = 1_000_000


def main(folder: Path) -> None:
    """Judge every answer twice and write what came out."""
    checker = leaderboard_checker(folder)
    result: dict[str, Any] = {"bfcl_eval": "2026.3.23", "sets": {}}
    for name in SETS:
        result["sets"][name] = compared(name, folder / "bfcl_eval/data", checker)
    for name in RESTRAINT_SETS:
        entry = ToolCallSet(name=name, questions=f"BFCL_v4_{name}.json", answers=None)
        questions = read_questions(folder / "bfcl_eval/data", entry, ALL)
        silent, calling = (figures(questions, [text] * len(questions)) for text in ("No function fits.", "f(x=1)"))
        result["sets"][name] = {**silent, "restraint_of_a_call": calling["restraint"]}
    write_json(RESULT, result)
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


def compared(name: str, data: Path, checker: Any) -> dict[str, Any]:
    """The perfect answers' score, and how many verdicts on changed answers are the same."""
    file = f"BFCL_v4_{name}.json"
    questions = read_questions(data, ToolCallSet(name=name, questions=file, answers=f"possible_answer/{file}"), ALL)
    perfect, different, judged, right, failed_there = [], [], 0, 0, 0
    for question in questions:
        expected = question.expected or {}
        best = perfect_arguments(expected)
        for called, arguments in changed_answers(expected, best):
            try:
                theirs = checker(expected, called, arguments)
            except (TypeError, KeyError, IndexError, AttributeError):
                failed_there += 1
                continue
            ours = figures([question], [answer_text(called, arguments)])["correct"] == 1
            judged, right = judged + 1, right + theirs
            different += [] if ours == theirs else [f"{question.id}: {called}({arguments}) is {theirs} there"]
        perfect.append(answer_text(expected["name"], best))
    return {
        **figures(questions, perfect),
        "verdicts": judged,
        "right_there": right,
        "different_verdicts": len(different),
        "failed_there": failed_there,
        "examples": different[:10],
    }


def figures(questions: list[Question], texts: list[str]) -> dict[str, Any]:
    """The evaluator's figures of answers to questions."""
    prompts = [{"task": "tool_calls.set", "expected": question.expected, "reference": ""} for question in questions]
    return score_tasks(prompts, texts)["tool_calls.set"]


def answer_text(name: str, arguments: dict[str, Any]) -> str:
    """The call as this project's training text has it."""
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}</tool_call>"


def perfect_arguments(expected: dict[str, Any]) -> dict[str, Any]:
    """The first accepted value of each parameter that must be there."""
    required = expected["function"]["parameters"]["required"]
    found = {}
    for key, values in expected["accepted"].items():
        stated = [value for value in values if value != ""]
        if stated and ("" not in values or key in required):
            found[key] = first_of(stated[0])
    return found


def first_of(value: Any) -> Any:
    """The value that accepted values stand for: those of an object's keys are lists of accepted values again."""
    if isinstance(value, dict):
        return {key: values[0] for key, values in value.items() if values and "" not in values}
    return [first_of(each) for each in value] if isinstance(value, list) else value


def changed_answers(expected: dict[str, Any], best: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The perfect call; every accepted value; and calls with one thing changed."""
    name = expected["name"]
    yield name, best
    yield f"{name}_", best
    yield name, {**best, "no_such_parameter": 1}
    for key, values in expected["accepted"].items():
        yield name, {other: value for other, value in best.items() if other != key}
        for value in values:
            first = first_of(value)
            for changed in (first, *changes(first)):
                yield name, {**best, key: changed}


def changes(value: Any) -> Iterator[Any]:
    """Values near one: of another type, written otherwise, shorter, longer, in another order."""
    yield from (str(value), [value], None, "", [], {}, 0, True)
    if isinstance(value, bool):
        yield from (not value, int(value))
    elif isinstance(value, (int, float)):
        yield from (float(value), int(value), value + 1, value + 0.5, -value)
    elif isinstance(value, str):
        yield from (
            value.upper(),
            value.replace(" ", ""),
            f"{value}.",
            f"{value}!",
            value[:-1],
            value.replace("-", "/"),
        )
        yield value.replace('"', "'")
    elif isinstance(value, list):
        yield from (value[:-1], value[::-1], [*value, *value[:1]], [str(each) for each in value])
        for at, each in enumerate(value):
            for changed in changes(each) if not isinstance(each, list) else ():
                yield [*value[:at], changed, *value[at + 1 :]]
    elif isinstance(value, dict):
        yield {**value, "no_such_key": 1}
        for key, each in value.items():
            yield {other: kept for other, kept in value.items() if other != key}
            for changed in changes(each) if not isinstance(each, dict) else ():
                yield {**value, key: changed}


def leaderboard_checker(folder: Path) -> Any:
    """The leaderboard's AST checker as (expected, name, arguments) -> whether the call is right."""
    if not (folder / "bfcl_eval").is_dir():
        raise DataError("no bfcl_eval here", folder, "pip download --no-deps bfcl-eval==2026.3.23, then unzip it there")
    sys.path.insert(0, str(folder))
    constants, converters = "bfcl_eval.constants", "bfcl_eval.eval_checker.ast_eval.type_convertor"
    dotted = SimpleNamespace(underscore_to_dot=False)
    stand_in(f"{constants}.model_config", MODEL_CONFIG_MAPPING={"model": dotted})
    stand_in(f"{converters}.java_type_converter", java_type_converter=None)
    stand_in(f"{converters}.js_type_converter", js_type_converter=None)
    program = importlib.import_module("bfcl_eval.eval_checker.ast_eval.ast_checker")
    python = importlib.import_module(f"{constants}.enums").Language.PYTHON

    def check(expected: dict[str, Any], name: str, arguments: dict[str, Any]) -> bool:
        accepted = {expected["name"]: expected["accepted"]}
        verdict = program.simple_function_checker(expected["function"], {name: arguments}, accepted, python, "model")
        return bool(verdict["valid"])

    return check


def stand_in(name: str, **content: Any) -> None:
    """A module in place of one that needs other packages."""
    module = ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module


if __name__ == "__main__":
    main(Path(sys.argv[1]))
