import json

import pytest
from parsing_support import outcome, parse, source, turns


def read(tmp_path, format_name, *values):
    return parse(tmp_path, "a.json", json.dumps(values).encode(), source(format_name))


def test_xlam_function_calling_60k(tmp_path):
    tools = [{"name": "temp", "description": "Temperature", "parameters": {"city": {"type": "str", "default": "Lyon"}}}]
    answers = [{"name": "temp", "arguments": {"city": "Brest"}}, {"name": "temp", "arguments": {"city": "Lille"}}]
    value = {"id": 1, "query": "How warm?", "tools": json.dumps(tools), "answers": json.dumps(answers)}
    rows = read(
        tmp_path,
        "tool_query",
        value,
        {**value, "tools": tools, "answers": answers},
        {**value, "answers": "[]"},
        {**value, "answers": "[{"},
        {**value, "answers": '[{"arguments": {}}]'},
        {**value, "tools": "{}"},
        {**value, "query": None},
    )
    for row in rows[:2]:
        assert turns(row) == [
            ("user", "How warm?"),
            (
                "assistant",
                '[{"arguments": {"city": "Brest"}, "name": "temp"}, {"arguments": {"city": "Lille"}, "name": "temp"}]',
            ),
        ]
        assert row.record.tools == json.dumps(tools)
    assert [outcome(row) for row in rows[2:]] == [
        "empty_assistant",
        "broken_tool_call",
        "broken_tool_call",
        "broken_tools",
        "missing_field",
    ]


SYSTEM = (
    "SYSTEM: You are a helpful assistant with access to the following functions. Use them if required -\n"
    '{\n    "name": "rate",\n    "description": "Get {a} rate"\n}\n\n{"name": "news"}\n'
)
NO_FUNCTIONS = "SYSTEM: You are a helpful assistant, with no access to external functions."


def test_glaive_function_calling_v2(tmp_path):
    chat = (
        "USER: What is the rate, and what's new?\n\n\n"
        'ASSISTANT: I will look. <functioncall> {"name": "rate", "arguments": \'{"to": "EUR", "by": "l\'État"}\'} '
        '<functioncall> {"name": "news", "arguments": {}} <|endoftext|>\n\n\n'
        'FUNCTION RESPONSE: {"rate": 0.9}\n\n\n'
        "ASSISTANT: It is 0.9.\n\nUSER is what I call you. <|endoftext|>\n\n\n"
        "USER: Thanks\n\n\nASSISTANT: You're welcome! <|endoftext|>\n"
    )
    rows = read(tmp_path, "glaive", {"system": SYSTEM, "chat": chat}, {"system": NO_FUNCTIONS, "chat": "USER: a"})
    assert turns(rows[0]) == [
        ("system", "You are a helpful assistant with access to the following functions. Use them if required"),
        ("user", "What is the rate, and what's new?"),
        (
            "assistant",
            '[{"arguments": {"by": "l\'État", "to": "EUR"}, "name": "rate"}, {"arguments": {}, "name": "news"}]',
        ),
        ("tool", '{"rate": 0.9}'),
        ("assistant", "It is 0.9.\n\nUSER is what I call you."),
        ("user", "Thanks"),
        ("assistant", "You're welcome!"),
    ]
    assert rows[0].record.messages[2].content == "I will look."
    assert rows[0].record.tools == '[{"name": "rate", "description": "Get {a} rate"}, {"name": "news"}]'
    assert turns(rows[1]) == [
        ("system", "You are a helpful assistant, with no access to external functions."),
        ("user", "a"),
    ]
    assert rows[1].record.tools is None


@pytest.mark.parametrize(
    ("reason", "system", "chat"),
    [
        ("broken_tools", "SYSTEM: Use - {'name': 'f'}", "USER: a"),
        ("broken_tools", 'SYSTEM: Use - {"name": "f"} or not', "USER: a"),
        ("duplicate_key", 'SYSTEM: Use - {"name": "f", "name": "g"}', "USER: a"),
        ("text_before_marker", SYSTEM, "Hello"),
        ("text_outside_turn", SYSTEM, "USER: a\n\n\nASSISTANT: b <|endoftext|> c"),
        ("empty_assistant", SYSTEM, "USER: a\n\n\nASSISTANT: <|endoftext|>"),
        ("broken_tool_call", SYSTEM, 'USER: a\n\n\nASSISTANT: <functioncall> {"name": "f", "arguments": \'{x}\'}'),
        ("broken_tool_call", SYSTEM, "USER: a\n\n\nASSISTANT: <functioncall> none"),
        ("broken_tool_call", SYSTEM, "USER: a\n\n\nASSISTANT: <functioncall> []"),
    ],
)
def test_each_fault_of_glaive_has_its_reason(tmp_path, reason, system, chat):
    assert [outcome(row) for row in read(tmp_path, "glaive", {"system": system, "chat": chat})] == [reason]
