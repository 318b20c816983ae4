import json

from finetune.data.conversations import parse_messages, parse_sharegpt
from finetune.data.record import Message
from finetune.data.rows import Fault, Origin, Parsed

ORIGIN = Origin("tools", "tools/a.jsonl", None)
CALLS = '[{"arguments": {"b": 1, "ville": "Évian"}, "name": "meteo"}]'


def lines(*values):
    return "\n".join(value if isinstance(value, str) else json.dumps(value) for value in values).encode()


def test_messages_accept_both_spellings_of_a_tool_call_and_store_one():
    arguments = {"ville": "Évian", "b": 1}
    openai = {"type": "function", "id": "1", "function": {"name": "meteo", "arguments": json.dumps(arguments)}}
    plain = {"name": "meteo", "arguments": arguments}
    for call in (openai, plain):
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
        tools = [{"name": "meteo", "description": "é"}]
        (row,) = parse_messages(lines({"messages": turns, "tools": tools, "group": "fil-7"}), ORIGIN)
        assert row.record.messages == (Message("user", "?"), Message("assistant", "", CALLS))
        assert row.record.tools == '[{"name": "meteo", "description": "é"}]'
        assert row.record.group == "tools/fil-7"


def test_sharegpt_speakers_become_roles_in_an_array_and_in_lines():
    item = {
        "system": "S",
        "tools": '[{"name": "f"}]',
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": '{"y": 2}'},
            {"from": "gpt", "value": "r"},
        ],
    }
    expected = (
        Message("system", "S"),
        Message("user", "q"),
        Message("assistant", "", '[{"arguments": {"x": 1}, "name": "f"}]'),
        Message("tool", '{"y": 2}'),
        Message("assistant", "r"),
    )
    for content in (json.dumps([item, item], indent=1).encode(), lines(item, item)):
        assert [row.record.messages for row in parse_sharegpt(content, ORIGIN)] == [expected, expected]


def test_a_broken_item_of_an_array_stays_alone_with_its_place():
    good = '{"conversations": [{"from": "human", "value": "a ] } \\" b"}, {"from": "gpt", "value": "c"}]}'
    content = f'[\n  {good},\n  {{"conversations": [}}],\n  {good}\n]\n'.encode()
    rows = list(parse_sharegpt(content, ORIGIN))
    assert [type(row) for row in rows] == [Parsed, Fault, Parsed]
    assert [(row.place.line, row.place.byte_offset) for row in rows] == [(2, 4), (3, 100), (4, 125)]
    assert rows[1].reason == "broken_json"
    assert rows[1].original == b'{"conversations": [}]'


def test_an_array_that_never_closes_is_one_fault_after_the_good_items():
    content = b'[{"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]}, {"conv'
    rows = list(parse_sharegpt(content, ORIGIN))
    assert [type(row) for row in rows] == [Parsed, Fault]
    assert (rows[1].reason, rows[1].original) == ("broken_json", b'{"conv')


def test_a_bad_line_never_stops_the_rest_and_each_fault_names_line_offset_and_reason():
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    user = {"role": "user", "content": "a"}
    bad = [
        ("broken_json", '{"messages": ['),
        ("broken_json", "[1]"),
        ("broken_json", '{"messages": NaN}'),
        ("broken_json", "[" * 20000),
        ("missing_field", {"message": []}),
        ("missing_field", {"messages": []}),
        ("missing_field", {"messages": [{"role": "user"}]}),
        ("unknown_role", {"messages": [{"role": "narrator", "content": "a"}]}),
        ("empty_assistant", {"messages": [user, {"role": "assistant", "content": " \n"}]}),
        ("missing_field", {"messages": [user, {"role": "assistant", "content": None}]}),
        ("broken_tool_call", {"messages": [user, {"role": "assistant", "content": "", "tool_calls": [{"x": 1}]}]}),
        ("broken_tools", {"messages": good["messages"], "tools": [1]}),
        ("broken_group", {"messages": good["messages"], "group": {}}),
        ("lone_surrogate", '{"messages": [{"role": "user", "content": "\\ud800"}]}'),
    ]
    content = lines(*(value for _, value in bad), "", good)
    rows = list(parse_messages(content, ORIGIN))
    assert [row.reason for row in rows[:-1]] == [reason for reason, _ in bad]
    assert isinstance(rows[-1], Parsed)
    assert [row.place.line for row in rows] == [*range(1, 15), 16]
    for row in rows[:-1]:
        assert content[row.place.byte_offset :].startswith(row.original)


def test_a_line_that_is_not_utf8_keeps_its_bytes():
    content = b'{"messages": [{"role": "user", "content": "\xe9t\xe9"}]}\n'
    (row,) = parse_messages(content, ORIGIN)
    assert (row.reason, row.detail, row.original) == ("invalid_utf8", "byte 0xe9 at 43 of the row", content)
    assert row.to_row()["original_base64"] == ("eyJtZXNzYWdlcyI6IFt7InJvbGUiOiAidXNlciIsICJjb250ZW50IjogIul06SJ9XX0K")
