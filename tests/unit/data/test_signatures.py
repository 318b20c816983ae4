import json

import pytest
from parsing_support import outcome, parse, source, turns

FUNCTIONS = '''Function:
def get_weather(city: str, days: int = 1, *, units: Literal["C", "F"] = "C", at: Optional[list[float]] = None):
    """
    Weather of a city.

    Args:
    city (str): Its name; match r"\\d" to refuse numbers.
    """

Function:
def send(to, body: "str", when=now(), **more) -> None

User Query: Will it rain?
'''


def read(tmp_path, call, functions=FUNCTIONS):
    content = json.dumps({"prompt": functions, "Input": "Will it rain?", "Output": call}).encode()
    columns = {"functions": "prompt", "query": "Input", "call": "Output"}
    (row,) = parse(tmp_path, "a.jsonl", content, source("signatures", columns=columns))
    return row


def test_nexusraven(tmp_path):
    row = read(tmp_path, "Call: get_weather('Brest', units=\"F\", at=(48.4, -4.5))\nThought: it asks for Brest.")
    assert turns(row) == [
        ("user", "Will it rain?"),
        ("assistant", '[{"arguments": {"at": [48.4, -4.5], "city": "Brest", "units": "F"}, "name": "get_weather"}]'),
    ]
    weather, send = json.loads(row.record.tools)
    assert weather == {
        "name": "get_weather",
        "description": 'Weather of a city.\n\nArgs:\ncity (str): Its name; match r"\\d" to refuse numbers.',
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer", "default": 1},
                "units": {"enum": ["C", "F"], "default": "C"},
                "at": {"type": "array", "items": {"type": "number"}, "default": None},
            },
            "required": ["city"],
        },
    }
    assert send == {
        "name": "send",
        "description": "",
        "parameters": {
            "type": "object",
            "properties": {"to": {}, "body": {"type": "string"}, "when": {"description": "default: now()"}},
            "required": ["to", "body"],
        },
    }


@pytest.mark.parametrize(
    ("annotation", "schema"),
    [
        ("float", {"type": "number"}),
        ("bool", {"type": "boolean"}),
        ("typing.List[Dict[str, int]]", {"type": "array", "items": {"type": "object"}}),
        ("Tuple[int, int]", {"type": "array"}),
        ("int | None", {"type": "integer"}),
        ("Union[int, str]", {"anyOf": [{"type": "integer"}, {"type": "string"}]}),
        ("Union[int, Path]", {}),
        ("Literal[1, 'a']", {"enum": [1, "a"]}),
        ("Literal[g()]", {}),
        ("Path", {}),
    ],
)
def test_a_type_becomes_json_schema(tmp_path, annotation, schema):
    row = read(tmp_path, "f(1)", f"def f(a: {annotation}):\n    pass")
    assert json.loads(row.record.tools)[0]["parameters"]["properties"] == {"a": schema}


@pytest.mark.parametrize("call", ["f(1); f(b=2, a=3)", "f(1)\nf(a=3, b=2)", "[f(1), f(a=3, b=2)]"])
def test_several_calls_are_one_turn(tmp_path, call):
    row = read(tmp_path, call, "def f(a, b=0): ...")
    assert turns(row)[1] == (
        "assistant",
        '[{"arguments": {"a": 1}, "name": "f"}, {"arguments": {"a": 3, "b": 2}, "name": "f"}]',
    )


@pytest.mark.parametrize(
    ("reason", "call"),
    [
        ("nested_call", "f(f(1))"),
        ("broken_tool_call", "f(__import__)"),
        ("broken_tool_call", "g(1)"),
        ("broken_tool_call", "f(1, 2, 3)"),
        ("broken_tool_call", "f(1, a=2)"),
        ("broken_tool_call", "f(**{'a': 1})"),
        ("broken_tool_call", "f(*[1])"),
        ("broken_tool_call", "f({1, 2})"),
        ("broken_tool_call", "f({1: 2})"),
        ("broken_tool_call", "f(1e999)"),
        ("broken_tool_call", "x = f(1)"),
        ("broken_tool_call", "1 + 1"),
        ("broken_tool_call", "f("),
        ("broken_tool_call", "f" + "(" * 5000),
        ("broken_tool_call", ""),
        ("nul_character", "f('\\0')"),
        ("lone_surrogate", "f('\\ud800')"),
    ],
)
def test_each_fault_of_a_call_has_its_reason(tmp_path, reason, call):
    assert outcome(read(tmp_path, call, "def f(a, b=0): ...")) == reason


@pytest.mark.parametrize("functions", ["", "f(a)", "def f(a", "def f(a\0): ..."])
def test_definitions_that_cannot_be_read_are_a_fault(tmp_path, functions):
    assert outcome(read(tmp_path, "f(1)", functions)) == "broken_tools"
