from __future__ import annotations

import json

import pytest

from finetune.evaluation.call_parser import Call, Parsed, parse_calls

PRICE = {"name": "get_price", "arguments": {"service": "chain"}}
CALL = Call("get_price", {"service": "chain"})
JSON = json.dumps(PRICE)
LLAMA = '{"name": "get_price", "parameters": {"service": "chain"}}'


@pytest.mark.parametrize(
    "text",
    [
        f"<tool_call>{JSON}</tool_call>",
        f"<tool_call>\n{JSON}\n</tool_call>\n",
        f"Je regarde.\n<tool_call>{JSON}</tool_call>",
        f"<|tool_call|>[{JSON}]<|/tool_call|>",
        f"[TOOL_CALLS] [{JSON}]",
        f"[TOOL_CALLS]{JSON}",
        '[TOOL_CALLS]get_price[ARGS]{"service": "chain"}',
        '[TOOL_CALLS]get_price[CALL_ID]a1b2c3d4e[ARGS]{"service": "chain"}',
        '[TOOL_CALLS]get_price{"service": "chain"}',
        f"<functioncall> {JSON}",
        """<functioncall> {"name": "get_price", "arguments": '{"service": "chain"}'}""",
        f"<|python_tag|>{LLAMA}",
        "<|python_tag|>get_price(service='chain')",
        JSON,
        LLAMA,
        f" [{JSON}] ",
        '{"type": "function", "function": {"name": "get_price", "arguments": "{\\"service\\": \\"chain\\"}"}}',
        'get_price(service="chain")',
        "[get_price(service='chain')]",
    ],
)
def test_every_form_of_a_call_is_read(text: str) -> None:
    assert parse_calls(text) == Parsed((CALL,), None)


@pytest.mark.parametrize(
    "text",
    [
        f"<tool_call>{JSON}</tool_call>\n<tool_call>{JSON}</tool_call>",
        f"[TOOL_CALLS] [{JSON}, {JSON}]",
        '[TOOL_CALLS]get_price[ARGS]{"service": "chain"}[TOOL_CALLS]get_price[ARGS]{"service": "chain"}',
        "[get_price(service='chain'), get_price(service='chain')]",
        f"[{JSON}, {LLAMA}]",
    ],
)
def test_several_calls_are_read(text: str) -> None:
    assert parse_calls(text) == Parsed((CALL, CALL), None)


def test_python_values_become_those_of_json() -> None:
    text = "a.b.f(x=-1, y=(1, [2.5, 'ü']), z={'k': (True, None)})"
    assert parse_calls(text).calls == (Call("a.b.f", {"x": -1, "y": [1, [2.5, "ü"]], "z": {"k": [True, None]}}),)
    assert parse_calls("f()").calls == (Call("f", {}),)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (f"<tool_call>{JSON}", "<tool_call> is not closed"),
        ('<tool_call>{"name": "f", "arguments": {</tool_call>', "neither JSON nor a call"),
        ("<tool_call>{'name': 'f', 'arguments': {}}</tool_call>", "neither JSON nor a call"),
        ('<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>', "neither JSON nor a call"),
        ("<tool_call></tool_call>", "neither JSON nor a call"),
        ("<tool_call>[]</tool_call>", "an empty list of calls"),
        ('<tool_call>"f"</tool_call>', "no function name in"),
        ('<tool_call>{"arguments": {}}</tool_call>', "no function name in"),
        ('<tool_call>{"name": "", "arguments": {}}</tool_call>', "no function name in"),
        ('<tool_call>{"name": "f"}</tool_call>', "the arguments of f are no object"),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "the arguments of f are no object"),
        ('<tool_call>{"name": "f", "arguments": "x"}</tool_call>', "the arguments of f are no object"),
        (f'<tool_call>{JSON}</tool_call><tool_call>{{"name": 1}}</tool_call>', "no function name in"),
        ("[TOOL_CALLS]", "neither JSON nor a call"),
        ("[TOOL_CALLS]f[ARGS]{1}", "the arguments of f are no object"),
        ('<functioncall> {"name": "f", "arguments": \'{"x": }\'}', "the arguments of f are no object"),
        ("<functioncall> {'name': f()}", "has a value that is no literal"),
        ('{"name": "f"}', "the arguments of f are no object"),
        ('{"function": "f", "arguments": {}}', "no function name in"),
        ("f(1)", "f has an argument without a name"),
        ("f(**{})", "f has an argument without a name"),
        ("f(x=chain)", "'f' has a value that is no literal"),
        ("(lambda: 1)()", "is no function's name"),
    ],
)
def test_what_looks_like_a_call_and_is_none_has_a_reason(text: str, fault: str) -> None:
    parsed = parse_calls(text)
    assert parsed.calls == ()
    assert parsed.fault is not None
    assert fault in parsed.fault


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Le prix est de 30 €.",
        "The workshop (12 rue des Lilas) is open.",
        "The price is f(x=1).",
        "[1, 2]",
        "[]",
        '{"price": 30}',
        '"name"',
        "{",
        "oui",
        "(" * 10_000,
        "[" * 100_000,
        "a\0b",
        "'\\d'",
        "9" * 5000,
        "f(" * 5000,
    ],
)
def test_an_answer_in_words_is_no_call_and_no_fault(text: str) -> None:
    assert parse_calls(text) == Parsed((), None)


@pytest.mark.parametrize(
    "text",
    [
        "get_price(service=",
        "[get_weather(city='Par",
        '{"name": "get_weather", "parameters": {"city": "Par',
        'Sure. {"name":"f","parameters":{"a":1}}',
        '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}',
        "f(x={1,2})",
        "f(x=1e999)",
        "f(x=b'a')",
        '<tool_call>{"name": "f", "arguments": {"x": "\\ud800"}}</tool_call>',
        "f" + "()" * 900,
    ],
)
def test_an_attempt_that_is_no_call_is_a_fault_not_restraint(text: str) -> None:
    parsed = parse_calls(text)
    assert parsed.calls == ()
    assert parsed.fault is not None
