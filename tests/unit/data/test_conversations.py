import hashlib
import json

from parsing_support import outcome, parse, source, turns

from finetune.data.record import Message
from finetune.data.rows import Parsed

CALLS = '[{"arguments": {"b": 1, "ville": "Évian"}, "name": "meteo"}]'


def lines(*values):
    return "\n".join(value if isinstance(value, str) else json.dumps(value) for value in values).encode()


def read(tmp_path, format_name, content, **given):
    return parse(tmp_path, "a.jsonl", content, source(format_name, **given))


def test_messages_accept_both_spellings_of_a_tool_call_and_store_one(tmp_path):
    arguments = {"ville": "Évian", "b": 1}
    openai = {"type": "function", "id": "1", "function": {"name": "meteo", "arguments": json.dumps(arguments)}}
    plain = {"name": "meteo", "arguments": arguments}
    for call in (openai, plain):
        said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
        tools = [{"name": "meteo", "description": "é"}]
        (row,) = read(tmp_path, "messages", lines({"messages": said, "tools": tools, "group": "fil-7"}))
        assert row.record.messages == (Message("user", "?"), Message("assistant", "", CALLS))
        assert row.record.tools == '[{"name": "meteo", "description": "é"}]'
        assert row.record.group == "s/fil-7"


def test_one_turn_can_hold_several_calls_and_integers_of_any_size(tmp_path):
    calls = [{"name": "f", "arguments": {"n": 2**70}}, {"name": "g", "arguments": {}}]
    content = lines({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": calls}]})
    (row,) = read(tmp_path, "messages", content)
    assert turns(row)[1] == (
        "assistant",
        '[{"arguments": {"n": 1180591620717411303424}, "name": "f"}, {"arguments": {}, "name": "g"}]',
    )


def test_sharegpt_speakers_become_roles_in_an_array_and_in_lines(tmp_path):
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
    expected = [
        ("system", "S"),
        ("user", "q"),
        ("assistant", '[{"arguments": {"x": 1}, "name": "f"}]'),
        ("tool", '{"y": 2}'),
        ("assistant", "r"),
    ]
    for content in (json.dumps([item, item], indent=1).encode(), lines(item, item)):
        assert [turns(row) for row in read(tmp_path, "sharegpt", content)] == [expected, expected]


def test_a_bad_line_never_stops_the_rest_and_each_fault_names_line_offset_and_reason(tmp_path):
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    user = {"role": "user", "content": "a"}
    bad = [
        ("broken_json", '{"messages": ['),
        ("not_an_object", "1"),
        ("broken_json", '{"messages": NaN}'),
        ("broken_json", '{"messages": 1e999}'),
        ("broken_json", '{"a":' * 20000),
        ("duplicate_key", '{"messages": [], "messages": []}'),
        ("missing_field", {"message": []}),
        ("wrong_type", {"messages": {}}),
        ("wrong_type", {"messages": ["a"]}),
        ("empty_conversation", {"messages": []}),
        ("missing_field", {"messages": [{"role": "user"}]}),
        ("wrong_type", {"messages": [{"role": "user", "content": 1}]}),
        ("unknown_role", {"messages": [{"role": "narrator", "content": "a"}]}),
        ("empty_assistant", {"messages": [user, {"role": "assistant", "content": " \n"}]}),
        ("missing_field", {"messages": [user, {"role": "assistant", "content": None}]}),
        ("broken_tool_call", {"messages": [user, {"role": "assistant", "content": "", "tool_calls": [{"x": 1}]}]}),
        ("broken_tools", {"messages": good["messages"], "tools": [1]}),
        ("broken_tools", {"messages": good["messages"], "tools": "["}),
        ("nul_character", {"messages": good["messages"], "tools": [{"name": "\0"}]}),
        ("broken_group", {"messages": good["messages"], "group": {}}),
        ("wrong_type", {"messages": good["messages"], "system": 1}),
        ("lone_surrogate", '{"messages": [{"role": "user", "content": "\\ud800"}]}'),
        ("nul_character", '{"messages": [{"role": "user", "content": "\\u0000"}]}'),
    ]
    content = lines(*(value for _, value in bad), "", good)
    rows = read(tmp_path, "messages", content)
    assert [row.reason for row in rows[:-1]] == [reason for reason, _ in bad]
    assert isinstance(rows[-1], Parsed)
    assert [row.place.line for row in rows] == [*range(1, 24), 25]
    for row in rows[:-1]:
        assert content[row.place.byte_offset :].startswith(row.original)


def test_json_is_read_to_200_levels(tmp_path):
    said = [{"role": "user", "content": "[" * 300}, {"role": "assistant", "content": "b"}]
    deep = [json.loads("[" * levels + "]" * levels) for levels in (197, 198)]
    rows = read(tmp_path, "messages", lines(*({"messages": said, "tools": [{"x": value}]} for value in deep)))
    assert [outcome(row) for row in rows] == ["parsed", "broken_json"]
    assert rows[1].detail == "more than 200 levels"


def test_a_line_that_is_not_utf8_keeps_its_bytes(tmp_path):
    content = b'{"messages": [{"role": "user", "content": "\xe9t\xe9"}]}\n'
    (row,) = read(tmp_path, "messages", content)
    assert (row.reason, row.detail, row.original) == ("invalid_utf8", "byte 0xe9 at 43 of the row", content)
    assert row.to_row()["original_base64"] == ("eyJtZXNzYWdlcyI6IFt7InJvbGUiOiAidXNlciIsICJjb250ZW50IjogIul06SJ9XX0K")


def test_a_tool_text_that_shows_the_spelling_of_a_nul_holds_none(tmp_path):
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (row,) = read(tmp_path, "messages", lines({"messages": said, "tools": [{"name": "\\u0000"}]}))
    assert row.record.tools == '[{"name": "\\\\u0000"}]'


def test_a_field_that_columns_names_must_be_there_and_another_may_be_absent(tmp_path):
    described = {"columns": {"text": "texte", "group": "fil"}}
    content = lines(
        {"texte": "abc", "fil": None}, {"texte": "abc"}, {"text": "abc", "fil": 1}, {"texte": None, "fil": 1}
    )
    rows = read(tmp_path, "text", content, **described)
    assert [outcome(row) for row in rows] == ["parsed", "missing_field", "missing_field", "missing_field"]
    assert rows[1].detail == "no fil; the row has texte"


def test_a_group_is_cut_to_its_first_characters(tmp_path):
    content = lines({"text": "a", "group": "2024-05-06 07:08"}, {"text": "a", "group": 20240506}, {"text": "a"})
    rows = read(tmp_path, "text", content, group_characters=7)
    assert [row.record.group for row in rows[:2]] == ["s/2024-05", "s/2024050"]
    assert rows[2].record.group == f"s/{rows[2].record.id}"


def test_filters_drop_by_value_and_type_and_an_absent_column_is_null(tmp_path):
    filters = [{"column": "ok", "any_of": [1, None]}]
    rows = read(
        tmp_path,
        "text",
        lines({"text": "a", "ok": 1}, {"text": "a", "ok": True}, {"text": "a"}, {"text": "a", "ok": 2}, {"ok": "x"}),
        filters=filters,
    )
    assert [outcome(row) for row in rows] == ["parsed", "filtered_ok", "parsed", "filtered_ok", "filtered_ok"]


def test_the_record_of_equal_content_has_one_id_whatever_its_file_and_source(tmp_path):
    (line,) = read(tmp_path, "text", b'{"text": "\\u00e9t\\u00e9"}', name="a")
    (cell,) = parse(tmp_path, "b.csv", "text\nété\n".encode(), source("text", name="b"))
    assert line.record.id == cell.record.id == "fe02b6b11fdf24fe7a8f2fc45eaf0167ba2b537782e4e16832c7c81031850d1e"


def test_the_id_is_the_hash_of_the_content_as_json(tmp_path):
    said = [
        {"role": "user", "content": 'é "\\\t\u2028\x7f'},
        {"role": "assistant", "tool_calls": {"name": "f", "arguments": {}}},
    ]
    (row,) = read(tmp_path, "messages", lines({"messages": said, "tools": [{"name": "f"}]}))
    record = row.record.to_row()
    content = json.dumps([record["messages"], record["tools"], None], ensure_ascii=False, sort_keys=True)
    assert row.record.id == hashlib.sha256(content.encode()).hexdigest()
