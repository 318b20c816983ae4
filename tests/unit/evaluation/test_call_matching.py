from __future__ import annotations

from typing import Any

import pytest

from finetune.evaluation.call_matching import arguments_fit, normalized, value_fits

FUNCTION = {
    "name": "book",
    "parameters": {
        "type": "dict",
        "properties": {"day": {"type": "string"}, "hour": {"type": "integer"}, "note": {"type": "string"}},
        "required": ["day"],
    },
}
ACCEPTED = {"day": ["tuesday", "mardi"], "hour": [14], "note": ["", "none"]}


@pytest.mark.parametrize(
    ("arguments", "fits"),
    [
        ({"day": "tuesday", "hour": 14}, True),
        ({"hour": 14, "day": "Mardi", "note": "None"}, True),
        ({"day": "tuesday", "hour": 14, "note": "quick"}, False),
        ({"day": "wednesday", "hour": 14}, False),
        ({"hour": 14}, False),  # required
        ({"day": "tuesday"}, False),  # not required, and may not be left out
        ({"day": "tuesday", "hour": 14, "who": "me"}, False),
        ({"day": "tuesday", "hour": "14"}, False),
        ({"day": "tuesday", "hour": 14.0}, False),
        ({"day": "tuesday", "hour": True}, False),
        ({}, False),
    ],
)
def test_arguments_of_a_call(arguments: dict[str, Any], fits: bool) -> None:
    assert arguments_fit(arguments, FUNCTION, ACCEPTED) is fits


def test_a_function_without_parameters_takes_none() -> None:
    function = {"name": "now", "parameters": {"type": "dict"}}
    assert arguments_fit({}, function, {})
    assert not arguments_fit({"zone": "UTC"}, function, {})


STRINGS, FLOATS, OBJECTS = ({"type": "array", "items": {"type": kind}} for kind in ("string", "float", "dict"))


@pytest.mark.parametrize(
    ("value", "schema", "accepted", "fits"),
    [
        # Texts: without case, blanks and ,./-_*^; one quote for the other; other signs count.
        ("April 1,2024", {"type": "string"}, ["april 1, 2024"], True),
        ("it's", {"type": "string"}, ['IT"S'], True),
        ("april 1: 2024", {"type": "string"}, ["april 1 2024"], False),
        ("my_data", {"type": "any"}, ["my data"], True),
        # Numbers: an integer stands for a float, and not the other way round.
        (5, {"type": "float"}, [5.0], True),
        (5.0, {"type": "number"}, [5.0], True),
        (5.0, {"type": "integer"}, [5], False),
        (5.5, {"type": "float"}, [5.0], False),
        (5, {"type": "float"}, [5], True),
        (True, {"type": "boolean"}, [True], True),
        ("true", {"type": "boolean"}, [True], False),
        (1, {"type": "boolean"}, [True], False),
        (None, {"type": "integer"}, [5], False),
        # Lists: the same items in the same order, of the declared type or of the accepted list's own.
        (["New York", "LA"], STRINGS, [["new york", "l.a."]], True),
        (["LA", "New York"], STRINGS, [["new york", "la"]], False),
        (["new york"], STRINGS, [["new york", "la"]], False),
        ([1.5, 2.0], FLOATS, [[1.5, 2.0]], True),
        ([1, 2], FLOATS, [[1, 2]], True),
        ([1.5, 2], FLOATS, [[1.5, 2.0]], False),
        ([], STRINGS, [["a"], ""], True),
        ([], STRINGS, [["a"]], False),
        ("a", STRINGS, [["a"]], False),
        ([33.4, -112.0], {"type": "tuple", "items": {"type": "float"}}, [[33.4, -112.0]], True),
        ([[1, 2], [3]], {"type": "array", "items": {"type": "array"}}, [[[1, 2], [3]]], True),
        # Objects: accepted values for each key.
        ({"a": "X-1", "b": 2}, {"type": "dict"}, [{"a": ["x1"], "b": [2, 3]}], True),
        ({"a": "x1"}, {"type": "object"}, [{"a": ["x1"], "b": ["", 2]}], True),
        ({"a": "x1"}, {"type": "dict"}, [{"a": ["x1"], "b": [2]}], False),
        ({"a": "x1", "c": 1}, {"type": "dict"}, [{"a": ["x1"]}], False),
        ({"a": ["x"]}, {"type": "dict"}, [{"a": [["x"]]}], True),
        ({"a": "x1"}, {"type": "dict"}, ["", {"a": ["x2"]}], False),
        ([{"a": 1}, {"a": 2}], OBJECTS, [[{"a": [1]}, {"a": [2]}]], True),
        ([{"a": 2}, {"a": 1}], OBJECTS, [[{"a": [1]}, {"a": [2]}]], False),
        ([{"a": 1}], OBJECTS, [[{"a": [1]}, {"a": [2]}]], False),
        # The accepted value is a variable, of another type than the parameter.
        ("my_list", STRINGS, ["my_list"], True),
        ("my list", STRINGS, ["my_list"], False),
        (True, {"type": "string"}, ["", True], True),
        ("true", {"type": "string"}, ["", True], False),
    ],
)
def test_values_by_the_leaderboards_rules(value: Any, schema: dict[str, Any], accepted: list[Any], fits: bool) -> None:
    assert value_fits(value, schema, accepted) is fits


def test_only_texts_are_normalised_also_within_a_list() -> None:
    assert normalized("A b,c./d-e_f*g^h") == "abcdefgh"
    assert normalized(["A b", 1, None, ["A b"]]) == ["ab", 1, None, ["A b"]]
