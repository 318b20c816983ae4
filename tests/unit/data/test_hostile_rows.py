"""No row of 1 MB takes long, whatever is in it: what is read twice is read a bounded number of times."""

import json
import time

import pytest
from parsing_support import outcome, parse, source

MEGABYTE = 1_000_000
# A parser that reads a row in proportion to its length takes under a second; one in proportion to its square, hours.
MOST_SECONDS = 5.0


def run_of(text):
    return text * (MEGABYTE // len(text))


def timed(tmp_path, file, content, described):
    start = time.process_time()
    rows = parse(tmp_path, file, content.encode(), described)
    assert time.process_time() - start < MOST_SECONDS
    return [outcome(row) for row in rows]


CALL = 'USER: a\n\nASSISTANT: <functioncall> {"name": "f", "arguments": \''


@pytest.mark.parametrize(
    ("format_name", "values", "expected"),
    [
        ("messages", {"messages": run_of('"')}, "broken_json"),
        ("messages", {"messages": "[" * 201 + '"' + run_of('\\"')}, "broken_json"),
        ("sharegpt", {"conversations": "[" + run_of("{")}, "broken_json"),
        ("alpaca", {"instruction": run_of("\n"), "output": run_of(" ")}, "empty_assistant"),
        ("prompt_completion", {"prompt": run_of("<|"), "completion": run_of("'")}, "parsed"),
        ("transcript", {"transcript": "\n\nHuman: a" + run_of("\n") + "x"}, "one_sided_dialogue"),
        ("transcript", {"transcript": run_of("\n\nHuman:")}, "empty_turn"),
        ("message_tree", {"message_id": "a", "parent_id": None, "role": "user", "text": run_of("\n")}, "no_answer"),
        ("tool_query", {"query": "q", "tools": "[]", "answers": run_of("[")}, "broken_tool_call"),
        ("glaive", {"system": "S", "chat": "USER: hi" + run_of("\n") + "x"}, "parsed"),
        ("glaive", {"system": "S", "chat": "USER: hi" + run_of("\n ") + "USER: x"}, "parsed"),
        ("glaive", {"system": "S", "chat": CALL + run_of("' ")}, "broken_tool_call"),
        ("glaive", {"system": run_of("{}"), "chat": "USER: a"}, "parsed"),
        ("signatures", {"functions": run_of(" ") + "x", "query": "q", "call": "f()"}, "broken_tools"),
        ("signatures", {"functions": "def f():", "query": "q", "call": run_of("f();")}, "broken_tool_call"),
        ("turns", {"turns": "[" + run_of('"",')}, "broken_json"),
        ("text", {"text": run_of("\\")}, "parsed"),
    ],
)
def test_a_row_of_one_run_is_read_in_proportion_to_its_length(tmp_path, format_name, values, expected):
    assert timed(tmp_path, "a.jsonl", json.dumps(values), source(format_name)) == [expected]


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("a.jsonl", '{"a": ' + "[" * 201 + '"' + run_of('\\"'), "broken_json"),
        ("a.jsonl", "{" + "".join(f'"k{n}": 1, ' for n in range(80_000)) + '"k79999": 2}', "duplicate_key"),
        ("a.json", '["' + run_of('\\"'), "broken_json"),
        ("a.csv", 'text\n"' + run_of('""'), "broken_csv"),
        ("a.txt", run_of("<|"), "parsed"),
        ("a.chatml", "<|im_start|>" + run_of(" ") + "! !", "text_before_marker"),
        ("a.chatml", "<|user|>\n<|" + run_of("a") + "|", "parsed"),
    ],
)
def test_a_line_of_one_run_is_read_in_proportion_to_its_length(tmp_path, file, content, expected):
    described = source("chatml" if file == "a.chatml" else "text")
    assert timed(tmp_path, file, content, described) == [expected]
