"""a call + the accepted values -> whether it is right, by the rules of the Berkeley Function-Calling Leaderboard.

They are those of its `simple` and `multiple` sets in Python, as the AST checker of bfcl-eval 2026.3.23 applies them;
benchmarks/tool_calls.py compares the verdicts. A parameter's value must have the declared type, where an integer may
stand for a float, and be one of the accepted values. Texts are compared without case, blanks and the signs ,./-_*^,
and single quotes equal double ones. "" among the accepted values means that the parameter may be left out. Where the
accepted values are of another type than the declared one, that type is right too, and values are compared as they are.
https://gorilla.cs.berkeley.edu/blogs/8_berkeley_function_calling_leaderboard.html
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

# The leaderboard's names of types and JSON Schema's; `any` is a text there.
TYPES: dict[str, type] = {
    "string": str,
    "any": str,
    "integer": int,
    "float": float,
    "number": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "object": dict,
}
IGNORED_SIGNS = re.compile(r"[ ,./\-_*^]")


def arguments_fit(arguments: Mapping[str, Any], function: Mapping[str, Any], accepted: Mapping[str, list[Any]]) -> bool:
    """Whether the arguments are those of an accepted call: none missing, none unknown, each with an accepted value."""
    properties = function["parameters"].get("properties", {})
    if not set(function["parameters"].get("required", ())) <= arguments.keys():
        return False
    return all(
        name in properties and name in accepted and value_fits(value, properties[name], accepted[name])
        for name, value in arguments.items()
    ) and all(name in arguments or "" in values for name, values in accepted.items())


def value_fits(value: Any, schema: Mapping[str, Any], accepted: Sequence[Any]) -> bool:
    """Whether a value has the declared type, or the accepted values' own, and is one of these."""
    declared, stated, found = TYPES[schema["type"]], _first_type(accepted), type(value)
    if declared is float and found is int:
        value, found = float(value), float
    if found is not declared:
        return found is stated and value in accepted
    if declared is list and not _items_fit(value, TYPES[schema["items"]["type"]], accepted):
        return False
    if stated is not None and stated is not declared:
        return value in accepted
    if declared is dict:
        return _object_fits(value, accepted)
    if declared is not list:
        return normalized_in(value, accepted)
    # The mark "" equals an empty list.
    lists = [[] if each == "" else each for each in accepted if each == "" or isinstance(each, list)]
    if TYPES[schema["items"]["type"]] is not dict:
        return normalized(value) in [normalized(each) for each in lists]
    return any(
        len(value) == len(each) and all(_object_fits(one, [other]) for one, other in zip(value, each, strict=True))
        for each in lists
    )


def normalized(value: Any) -> Any:
    """A text without case and ignored signs; a list with its texts so; anything else as it is."""
    if isinstance(value, str):
        return IGNORED_SIGNS.sub("", value).lower().replace("'", '"')
    return [normalized(each) if isinstance(each, str) else each for each in value] if isinstance(value, list) else value


def _first_type(accepted: Sequence[Any]) -> type | None:
    """The type of the first value that is not the mark "" of a parameter that may be left out."""
    return next((type(each) for each in accepted if each != ""), None)


def _items_fit(value: list[Any], declared: type, accepted: Sequence[Any]) -> bool:
    """Whether all items have the declared type, or that of the first item, for one of the accepted lists at least."""
    return any(
        not isinstance(each, list) or all(type(item) in (declared, _first_type(each)) for item in value)
        for each in accepted
    )


def _object_fits(value: Any, accepted: Sequence[Any]) -> bool:
    """Whether an object has, for one of the accepted {key: [values]}, only its keys, each with one of the values."""
    return any(
        isinstance(value, dict)
        and isinstance(each, dict)
        and all(key in each and normalized_in(one, each[key]) for key, one in value.items())
        and all(key in value or "" in values for key, values in each.items())
        for each in accepted
    )


def normalized_in(value: Any, accepted: Sequence[Any]) -> bool:
    """Whether a value in an object is accepted: texts are normalised, lists are compared as they are."""
    if isinstance(value, str):
        return normalized(value) in [normalized(each) for each in accepted if isinstance(each, str)]
    return value in accepted
