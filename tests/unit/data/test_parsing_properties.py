"""Whatever the bytes of a file, no parser crashes, and every byte of it is accounted for.

The law, for every container but Parquet: the rows stand in the order of the file and do not overlap; each one's line
and offset point at its original bytes; what no row holds is blank, the separators of an array, or a table's header.
"""

import json

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parsing_support import source

from finetune.data.reading import json_items, lines
from finetune.data.reading.containers import chatml_conversations, container_of, raw_rows
from finetune.data.reading.formats import READERS, chunks, parse_chunk
from finetune.data.reading.lines import Chunk
from finetune.data.rows import Fault, Parsed, Skipped
from finetune.errors import DataError
from finetune.source_sections import FIELDS

# Derandomised: a run in CI fails or passes for the commit's sake, never for the day's.
PROPERTY = settings(max_examples=80, deadline=None, derandomize=True, database=None)
PIECES = [
    *(b"\n", b"\r\n", b" ", b"\t", b'"', b'""', b"\\", b",", b"[", b"]", b"{", b"}", b"\0", b"\xff", b"\xef\xbb\xbf"),
    *(b"\xff\xfe", "é".encode(), "€".encode()[:2], b"text", b'{"text": "ab"}', b'{"text": "a", "text": 1}', b"NaN"),
    *(b'{"text": "\\ud800\\u0000"}', b'[{"text": "a,]"},\n', b'"a\nb"', b'x,"a', b'{"a": "', b"\x1c", b"\x0c"),
    *(b"<|user|>\n", b"<|assistant|>\n", b"<|system|>", b"<|im_start|>user\n", b"<|im_end|>", b"<|im_start|>"),
]
CONTENT = st.binary(max_size=60) | st.lists(st.sampled_from(PIECES), max_size=25).map(b"".join)
OUTSIDE_ROWS = {
    "a.jsonl": b" \t\r\n\x0b\f",
    "a.json": b" \t\r\n\x0b\f,[]",
    "a.txt": b" \t\r\n\x0b\f",
    "a.chatml": b" \t\r\n\x0b\f",
}
TEXT, CHATML = source("text"), source("chatml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("raw")


def originals(folder, file, content):
    """(line, offset, bytes) of each raw row of the whole file."""
    (folder / file).write_bytes(content)
    whole = Chunk(file, 0, None, 1)
    if file.endswith(".chatml"):
        return [
            (row.line, row.byte_offset, b"".join(row.original)) for row in chatml_conversations(folder / file, whole)
        ]
    rows = raw_rows(folder / file, whole, container_of(file, TEXT), ["text"])
    return [(row.place.line, row.place.byte_offset, row.original) for row in rows]


def rows_of(folder, file, described):
    return [row for chunk in chunks(folder, file, described) for row in parse_chunk(folder, chunk, described)]


def check_written(rows):
    """Each row can be written as the stage writes it."""
    for row in rows:
        if isinstance(row, Skipped):
            assert row.reason
        else:
            assert orjson.dumps(row.record.to_row() if isinstance(row, Parsed) else row.to_row())


def check_law(content, found, outside):
    end, between = 0, b""
    for line, offset, original in found:
        assert original
        assert offset >= end
        assert content[offset : offset + len(original)] == original
        assert line == 1 + content.count(b"\n", 0, offset)
        between += content[end:offset]
        end = offset + len(original)
    between += content[end:]
    assert between.removeprefix(b"\xef\xbb\xbf").strip(outside) == b""


@pytest.mark.parametrize("file", sorted(OUTSIDE_ROWS))
@PROPERTY
@given(content=CONTENT)
def test_every_byte_of_json_text_and_chatml_is_accounted_for(folder, file, content):
    found = originals(folder, file, content)
    array = file == "a.jsonl" and content.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")[:1] == b"["
    check_law(content, found, OUTSIDE_ROWS["a.json" if array else file])
    described = CHATML if file.endswith(".chatml") else TEXT
    rows = rows_of(folder, file, described)
    if content[:2] not in lines.UTF16_BOMS:
        assert [(row.place.line, row.place.byte_offset) for row in rows] == [place[:2] for place in found]
    for row in rows:
        assert isinstance(row, Parsed | Fault)
    check_written(rows)


@pytest.mark.parametrize("file", ["a.csv", "a.tsv"])
@PROPERTY
@given(body=CONTENT)
def test_every_byte_of_a_table_is_accounted_for(folder, file, body):
    header = b"text,b\n" if file == "a.csv" else b"text\tb\n"
    found = originals(folder, file, header + body)
    check_law(body, [(line - 1, offset - 7, original) for line, offset, original in found], b"\r\n")
    rows = rows_of(folder, file, TEXT)
    assert [row.place.byte_offset for row in rows] == [offset for _, offset, _ in found]
    check_written(rows)


@PROPERTY
@given(content=CONTENT)
def test_a_table_of_any_bytes_is_rows_or_a_data_error_about_its_header(folder, content):
    (folder / "b.csv").write_bytes(content)
    try:
        rows = rows_of(folder, "b.csv", TEXT)
    except DataError as fault:
        rows, error = [], fault.what
    else:
        error = ""
    assert all(isinstance(row, Parsed | Fault) for row in rows)
    assert error == "" or "header" in error


@pytest.mark.parametrize("file", [*sorted(OUTSIDE_ROWS), "a.csv"])
@PROPERTY
@given(content=CONTENT, chunk_bytes=st.integers(1, 30), block_bytes=st.integers(1, 9), row_bytes=st.integers(8, 40))
def test_no_cut_and_no_block_changes_a_row(folder, file, content, chunk_bytes, block_bytes, row_bytes):
    described = CHATML if file.endswith(".chatml") else TEXT
    (folder / file).write_bytes(b"text\n" * (file == "a.csv") + content)
    whole = list(parse_chunk(folder, Chunk(file, 0, None, 1), described))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "CHUNK_BYTES", chunk_bytes)
        patch.setattr(json_items, "BLOCK_BYTES", block_bytes)
        cut = chunks(folder, file, described)
        assert rows_of(folder, file, described) == whole
        assert [chunk.start for chunk in cut[1:]] == [chunk.end for chunk in cut[:-1]]
        for module in (lines, json_items):
            patch.setattr(module, "MAX_ROW_BYTES", row_bytes)
        bounded = rows_of(folder, file, described)
    if file in ("a.jsonl", "a.txt", "a.json"):
        assert [row.place for row in bounded] == [row.place for row in whole]


# Any character, lone surrogates too, which JSON can spell.
ANY_TEXT = st.text(st.characters())
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT | st.sampled_from(["user", "f(a=1)", "[]"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            ANY_TEXT | st.sampled_from(["role", "content", "from", "value", "name", "arguments", "tool_calls"]), inner
        )
    ),
    max_leaves=8,
)
SENTENCE = st.lists(
    st.sampled_from(
        [
            *(
                "\n\nHuman: ",
                "\n\nAssistant:",
                "USER: ",
                "\n\n\nASSISTANT: ",
                "<functioncall> ",
                "<|endoftext|>",
                "{",
                "}",
            ),
            *(
                '{"name": "f", "arguments": \'',
                "'}",
                '{"name": "f"}',
                "def f(a: int = 1):",
                "\n    pass\n",
                "f(a=1)",
                "f(",
            ),
            *("Function:\n", "é", "\0", "\ud800", ")", "[", "]", "'", '"', ";", "\n", "SYSTEM: ", "- ", "a"),
        ]
    ),
    max_size=10,
).map("".join)


@pytest.mark.parametrize("format_name", sorted({*READERS, "message_tree"}))
@PROPERTY
@given(data=st.data())
def test_any_values_under_the_names_of_a_format_are_one_row_each(folder, format_name, data):
    fields = FIELDS[format_name]
    named = st.fixed_dictionaries({}, optional=dict.fromkeys(fields, VALUE | SENTENCE))
    values = data.draw(st.lists(named | st.dictionaries(ANY_TEXT, VALUE, max_size=2), min_size=1))
    (folder / "v.jsonl").write_text("\n".join(json.dumps(value) for value in values))
    rows = rows_of(folder, "v.jsonl", source(format_name))
    assert [row.place.line for row in rows] == list(range(1, len(values) + 1))
    for row in rows:
        assert isinstance(row, Parsed | Fault | Skipped)
    check_written(rows)


@pytest.mark.parametrize("paths", ["best", "all"])
@PROPERTY
@given(links=st.lists(st.tuples(st.integers(0, 12), st.none() | st.integers(0, 12), st.booleans()), max_size=12))
def test_every_message_of_a_tree_is_on_a_path_or_skipped_or_a_fault(folder, paths, links):
    messages = [
        {"message_id": f"m{own}", "parent_id": None if parent is None else f"m{parent}", "text": f"{place}"}
        | {"role": "assistant" if answers else "prompter"}
        for place, (own, parent, answers) in enumerate(links)
    ]
    (folder / "t.jsonl").write_text("\n".join(json.dumps(message) for message in messages))
    rows = rows_of(folder, "t.jsonl", source("message_tree", paths=paths))
    on_paths = [message.content for row in rows if isinstance(row, Parsed) for message in row.record.messages]
    elsewhere = [f"{row.place.line - 1}" for row in rows if not isinstance(row, Parsed)]
    assert sorted({*on_paths, *elsewhere}, key=int) == [f"{place}" for place in range(len(links))]
    assert len({*on_paths}) + len(elsewhere) == len(links)
    if paths == "best":
        assert len(on_paths) == len({*on_paths})
