import gzip
import json

import pyarrow
import pytest
from parsing_support import outcome, parse, source, turns
from pyarrow import parquet

from finetune.data.reading import json_items, lines
from finetune.data.reading.formats import check_file, chunks, parse_chunk
from finetune.data.rows import Fault, Parsed
from finetune.errors import DataError

TEXT = source("text")
ROWS = b'{"text": "un"}\n\n{"text": "deux"}\n{"text": 3}\n'


def texts(rows):
    return [row.record.text if isinstance(row, Parsed) else row.reason for row in rows]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("a.jsonl", ROWS),
        ("a.json", b'[{"text": "un"},\n{"text": "deux"}, {"text": 3}]'),
        ("a.jsonl.gz", gzip.compress(ROWS, mtime=0)),
        ("a.json.gz", gzip.compress(b'\n [{"text": "un"}, {"text": "deux"}, {"text": 3}]', mtime=0)),
    ],
)
def test_json_comes_in_lines_or_in_an_array_plain_or_compressed(tmp_path, file, content):
    assert texts(parse(tmp_path, file, content, TEXT)) == ["un", "deux", "wrong_type"]


def test_a_line_of_a_text_file_is_a_row_and_blank_ones_are_none(tmp_path):
    rows = parse(tmp_path, "a.txt", b"un  \r\n \n\tdeux\n\xff\na\0b\nfin", TEXT)
    assert texts(rows) == ["un  ", "\tdeux", "invalid_utf8", "nul_character", "fin"]
    assert [(row.place.line, row.place.byte_offset) for row in rows] == [(1, 0), (3, 8), (4, 14), (5, 16), (6, 20)]
    assert rows[2].original == b"\xff\n"


def test_places_in_a_compressed_file_are_those_of_its_content(tmp_path):
    rows = parse(tmp_path, "a.jsonl.gz", gzip.compress(ROWS, mtime=0), TEXT)
    assert [(row.place.line, row.place.byte_offset) for row in rows] == [(1, 0), (3, 16), (4, 33)]
    assert rows[2].original == b'{"text": 3}\n'


def test_a_damaged_compressed_file_is_an_error_and_not_a_shorter_file(tmp_path):
    whole = gzip.compress(ROWS, mtime=0)
    for content in (whole[:-9], whole[:-5] + b"\0" + whole[-4:], ROWS):
        with pytest.raises(DataError, match="the compressed file is damaged"):
            parse(tmp_path, "a.jsonl.gz", content, TEXT)


def test_an_unknown_ending_is_an_error_that_lists_the_known_ones(tmp_path):
    for file in ("a.xml", "a", "a.parquet.gz"):
        with pytest.raises(DataError, match="is no known container") as caught:
            parse(tmp_path, file, ROWS, TEXT)
        assert ".json, .jsonl, .csv, .tsv, .parquet, .txt" in caught.value.remedy


def test_a_utf16_file_is_faults_line_by_line(tmp_path):
    content = "\ufeff{}\n{}\n".encode("utf-16-le")
    for described in (TEXT, source("chatml"), source("message_tree")):
        rows = parse(tmp_path, "a.json", content, described)
        assert [row.reason for row in rows] == ["utf16"] * 3
        assert b"".join(row.original for row in rows) == content


def test_a_line_beyond_16_mib_is_not_read_whole(tmp_path):
    long = b'{"text": "' + b"a" * 17_000_000 + b'"}\n'
    content = b'{"text": "un"}\n' + long + b'{"text": "deux"}\n'
    rows = parse(tmp_path, "a.jsonl", content, TEXT)
    assert texts(rows) == ["un", "line_too_long", "deux"]
    assert (rows[1].original, rows[1].place.byte_offset) == (long[:4096], 15)
    assert rows[1].detail == "17000013 bytes, more than 16777216; the first 4096 are kept here"
    assert (rows[2].place.line, rows[2].place.byte_offset) == (3, 17_000_028)
    array = b'[{"text": "un"}, ' + long + b', {"text": "deux"}]'
    assert texts(parse(tmp_path, "a.json", array, TEXT)) == ["un", "line_too_long", "deux"]
    table = b"text\nun\n" + b"a" * 17_000_000 + b"\ndeux\n"
    assert texts(parse(tmp_path, "a.csv", table, TEXT)) == ["un", "line_too_long", "deux"]


def test_a_broken_item_of_an_array_stays_alone_with_its_place(tmp_path):
    good = '{"conversations": [{"from": "human", "value": "a ] } \\" b"}, {"from": "gpt", "value": "c"}]}'
    content = f'[\n  {good},\n  {{"conversations": [}}],\n  {good}\n]\n'.encode()
    rows = parse(tmp_path, "a.json", content, source("sharegpt"))
    assert [type(row) for row in rows] == [Parsed, Fault, Parsed]
    assert [(row.place.line, row.place.byte_offset) for row in rows] == [(2, 4), (3, 100), (4, 125)]
    assert rows[1].reason == "broken_json"
    assert rows[1].original == b'{"conversations": [}]'


def test_a_lost_quote_in_an_array_ends_with_its_line(tmp_path):
    content = b'[\n{"text": "un},\n{"text": "deux"},\n{"text": "trois"}\n]'
    assert texts(parse(tmp_path, "a.json", content, TEXT)) == ["broken_json"]
    content = b'[\n{"text": "un\n},\n{"text": "deux"},\n{"text": "trois"}\n]'
    assert texts(parse(tmp_path, "a.json", content, TEXT)) == ["broken_json", "deux", "trois"]


def test_an_array_that_never_closes_is_one_fault_after_the_good_items(tmp_path):
    rows = parse(tmp_path, "a.json", b'[{"text": "un"}, {"tex', TEXT)
    assert texts(rows) == ["un", "broken_json"]
    assert rows[1].original == b'{"tex'


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("a.json", b'{\n  "data": [\n    {"text": "un"}\n  ]\n}\n'),
        ("a.json", b'\n{"data": [\n  {"text": "un"}\n]}\n'),
        ("a.json", b'{"data": {"text": "un",\r\n"b": 1}}'),
        ("a.jsonl", b"\xef\xbb\xbf \n{ \r\n}"),
    ],
)
def test_one_object_over_several_lines_is_an_error_with_its_remedy(tmp_path, file, content):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match="one JSON object stands over several lines") as caught:
        check_file(tmp_path, file, TEXT)
    assert "JSON lines" in caught.value.remedy


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("a.json", ROWS),
        ("a.json", b'{"text": "un'),
        ("a.json", b'{"text": "un\n{"text": "deux"}\n'),
        ("a.json", b'{"messages": [\n{"text": "deux"}\n'),
        ("a.json", b'[\n{\n"text": "un"}]'),
        ("a.jsonl", b'{"messages": [\n"text"\n'),
        ("a.json", b'{"text": "{"}\n'),
    ],
)
def test_a_broken_first_row_is_a_row_and_no_error(tmp_path, file, content):
    (tmp_path / file).write_bytes(content)
    check_file(tmp_path, file, TEXT)


def test_a_string_may_go_on_over_any_block_of_an_array(tmp_path, monkeypatch):
    content = b'[{"text": "a\\\\\\"],[{"},\n{"text": "\\\\"}, {"text": "\\"}]"} ]'
    for block_bytes in range(1, 20):
        monkeypatch.setattr(json_items, "BLOCK_BYTES", block_bytes)
        assert texts(parse(tmp_path, "a.json", content, TEXT)) == ['a\\"],[{', "\\", '"}]']


def long_file(kind):
    """About 40 MB of rows, some over several lines, some broken, and the source that reads them."""
    mot = "mot " * 200
    if kind == "csv":
        rows = [f'"{n}\n{mot}"' if n % 7 else f'"{n} ouvert {mot}' for n in range(48_000)]
        return "a.csv", "\n".join(["text", *rows]).encode(), TEXT
    if kind == "chatml":
        rows = [f"<|user|>\n{n}\n\n<|narrator|>\n" if n % 9 == 0 else f"<|user|>\n{n} {mot}\n" for n in range(48_000)]
        return "a.chatml", "\n".join(row + "<|assistant|>\nb\n" for row in rows).encode(), source("chatml")
    rows = [{"text": f"{n}\n {mot}"} if n % 9 else n for n in range(48_000)]
    if kind == "array":
        return "a.json", json.dumps(rows, indent=1).encode(), TEXT
    return "a.jsonl", b"\n\n".join(json.dumps(row).encode() for row in rows), TEXT


@pytest.mark.parametrize("kind", ["lines", "array", "csv", "chatml"])
def test_chunks_parse_to_the_rows_of_the_whole_file(tmp_path, kind):
    file, content, described = long_file(kind)
    (tmp_path / file).write_bytes(content)
    cut = chunks(tmp_path, file, described)
    assert len(cut) >= 3
    assert [chunk.start for chunk in cut[1:]] == [chunk.end for chunk in cut[:-1]]
    assert all(16 << 20 <= chunk.end - chunk.start < 17 << 20 for chunk in cut[:-1])
    whole = type(cut[0])(file, 0, None, 1)
    parts = [row for chunk in cut for row in parse_chunk(tmp_path, chunk, described)]
    assert parts == list(parse_chunk(tmp_path, whole, described))
    assert len(parts) >= 24_000
    assert len({outcome(row) for row in parts}) >= 2


def test_a_compressed_file_is_one_chunk_as_it_can_only_be_read_from_its_start(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "CHUNK_BYTES", 8)
    for file, content, described in (
        ("a.jsonl.gz", ROWS, TEXT),
        ("a.json.gz", b'[{"text": "un"}, {"text": "deux"}]', TEXT),
        ("a.csv.gz", b"text\nun\ndeux\ntrois\n", TEXT),
        ("a.txt.gz", ROWS, TEXT),
        ("a.gz", b"<|user|>\na\n\n<|system|>\nb\n", source("chatml")),
    ):
        (tmp_path / file).write_bytes(gzip.compress(content, mtime=0))
        (chunk,) = chunks(tmp_path, file, described)
        assert (chunk.start, chunk.end, chunk.first_line) == (0, None, 1)
        assert len(list(parse_chunk(tmp_path, chunk, described))) >= 2


def test_parquet_rows_are_read_by_row_group(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "r"}]} for n in range(5)
    ]
    rows[3]["messages"] = []
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=2)
    described = source("messages")
    check_file(tmp_path, "a.parquet", described)
    parsed = [
        row for chunk in chunks(tmp_path, "a.parquet", described) for row in parse_chunk(tmp_path, chunk, described)
    ]
    assert [outcome(row) for row in parsed] == ["parsed", "parsed", "parsed", "empty_conversation", "parsed"]
    assert turns(parsed[4]) == [("user", "q4"), ("assistant", "r")]
    assert [row.place.line for row in parsed] == [1, 2, 3, 4, 5]
    assert parsed[0].place.byte_offset == parsed[1].place.byte_offset == 4
    assert 4 < parsed[2].place.byte_offset < (tmp_path / "a.parquet").stat().st_size
    assert parsed[3].original == b'{"messages": []}'


def test_parquet_columns_that_nobody_reads_may_hold_anything_and_a_value_beyond_python_is_one_fault(tmp_path):
    seconds = pyarrow.array([0, 10**15, 1], pyarrow.timestamp("s"))
    table = pyarrow.table({"text": ["un", "deux", "trois"], "made": seconds, "other": seconds})
    parquet.write_table(table, tmp_path / "a.parquet")
    for described, expected in (
        (TEXT, ["un", "deux", "trois"]),
        (source("text", columns={"group": "made"}), ["un", "broken_value", "trois"]),
        (source("text", filters=[{"column": "made", "any_of": [None]}]), ["filtered_made", "broken_value"]),
    ):
        check_file(tmp_path, "a.parquet", described)
        (chunk,) = chunks(tmp_path, "a.parquet", described)
        rows = list(parse_chunk(tmp_path, chunk, described))
        assert texts(rows)[: len(expected)] == expected
        assert [row.place.line for row in rows] == [1, 2, 3]


def test_a_bad_byte_in_a_parquet_text_is_one_fault(tmp_path):
    values = pyarrow.array([b"un", b"\xff", b"trois"]).cast(pyarrow.binary()).view(pyarrow.utf8())
    parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
    rows = [row for chunk in chunks(tmp_path, "a.parquet", TEXT) for row in parse_chunk(tmp_path, chunk, TEXT)]
    assert texts(rows) == ["un", "invalid_utf8", "trois"]
    assert b"\xff" in rows[1].original


def test_a_parquet_file_that_is_damaged_or_lacks_a_column_is_an_error(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(DataError, match="not a Parquet file"):
        check_file(tmp_path, "a.parquet", TEXT)
    parquet.write_table(pyarrow.table({"texte": ["un"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"column\(s\) text not in the header, which has: texte"):
        check_file(tmp_path, "a.parquet", TEXT)


def test_a_text_file_has_one_column(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"un\n")
    check_file(tmp_path, "a.txt", TEXT)
    with pytest.raises(DataError, match=r"column\(s\) fil not in the header, which has: text"):
        check_file(tmp_path, "a.txt", source("text", columns={"group": "fil"}))
