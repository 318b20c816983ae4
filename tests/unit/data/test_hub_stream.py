"""The first rows of remote files, read through the real Hub client from the stand-in that counts what it sends."""

import gzip
import hashlib
import io
import json
import random

import pyarrow
import pytest
from hub_server import REVISION, Fault, fetch, fetch_each, serving, streamed_source
from pyarrow import parquet

from finetune.io import read_json

ROWS = [b'{"text": "ligne %d %s"}' % (number, b"x" * (number % 50)) for number in range(3000)]
NOISE = random.Random(7).randbytes(3 << 20).hex().encode()  # noqa: S311
KIB = 1 << 10


def lines(rows):
    return b"".join(row + b"\n" for row in rows)


def table_bytes(rows=30_000):
    # Noise does not compress, so that most of the file lies behind a small budget.
    table = pyarrow.table(
        {"text": [NOISE[i * 200 : i * 200 + 200].decode() for i in range(rows)], "n": list(range(rows))}
    )
    out = io.BytesIO()
    parquet.write_table(table, out, row_group_size=rows)
    return out.getvalue()


FILES = {
    # Listed last, read last: the order is that of the names.
    "en/c.0002.json.gz": gzip.compress(lines(ROWS[2000:]), mtime=0),
    "en/c.0000.json.gz": gzip.compress(lines(ROWS[:1000]), mtime=0),
    "en/c.0001.json.gz": gzip.compress(lines(ROWS[1000:2000]), mtime=0),
    "big.jsonl": lines(b'{"text": "%s"}' % NOISE[start : start + 1000] for start in range(0, 6 << 20, 1000)),
    "table.parquet": table_bytes(),
    "odd.jsonl": b'{"a": 1}\r\n\n  \n{broken\n\xff\xfe\nlast without newline',
    "list.json": b'[{"a": 1}]\n',
    "note.txt": b"text\n",
}


@pytest.fixture
def hub():
    yield from serving({"datasets/team/data": dict(FILES)})


def rows_of(work):
    return (work / "raw/s/stream.jsonl").read_bytes()


def sent(hub, suffix=""):
    return sum(request.sent_bytes for request in hub.of(suffix))


def test_rows_come_in_the_order_of_the_files_up_to_the_budget_and_are_listed(hub, tmp_path):
    done = fetch(hub, tmp_path, streamed_source(files="en/*.json.gz", max_rows=1500))
    assert done.returncode == 0, done.stderr
    assert rows_of(tmp_path) == lines(ROWS[:1500])
    assert hub.of("c.0002.json.gz") == []
    (entry,) = read_json(tmp_path / "raw/manifest.json")["sources"]
    content, files = lines(ROWS[:1500]), hub.repos["datasets/team/data"]
    digest = hashlib.sha256(content).hexdigest()
    assert entry["files"] == [{"path": "s/stream.jsonl", "sha256": digest, "size_bytes": len(content)}]
    assert (entry["origin"], entry["revision"]) == ("hub_stream:team/data/en/*.json.gz", REVISION)
    assert entry["streamed"] == {
        "max_rows": 1500,
        "max_bytes": None,
        "rows": 1500,
        "size_bytes": len(content),
        "complete": False,
        "files": [
            {
                "path": f"en/c.000{number}.json.gz",
                "digest": hashlib.sha256(files[f"en/c.000{number}.json.gz"]).hexdigest(),
                "size_bytes": len(files[f"en/c.000{number}.json.gz"]),
                "rows": rows,
            }
            for number, rows in ((0, 1000), (1, 500))
        ],
    }


def test_all_rows_are_taken_where_the_budget_is_larger_than_the_files(hub, tmp_path):
    assert fetch(hub, tmp_path, streamed_source(files="en/*", max_rows=10**9, max_bytes=10**9)).returncode == 0
    assert rows_of(tmp_path) == lines(ROWS)
    assert read_json(tmp_path / "raw/manifest.json")["sources"][0]["streamed"]["complete"] is True


def test_a_budget_in_bytes_ends_before_the_row_that_would_break_it_and_the_rest_is_not_downloaded(hub, tmp_path):
    assert fetch(hub, tmp_path, streamed_source(files="big.jsonl", max_bytes=200_000)).returncode == 0
    # 197 rows of 1000 characters with 12 around them and a newline; a 198th would make 200,574 bytes.
    assert len(rows_of(tmp_path)) == 197 * 1013
    assert hub.repos["datasets/team/data"]["big.jsonl"].startswith(rows_of(tmp_path))
    assert sent(hub, "big.jsonl") == 64 * KIB * (2 + 4)
    assert len(hub.repos["datasets/team/data"]["big.jsonl"]) > 6 << 20


@pytest.mark.parametrize("kind", ["cut", "reset", "stall"])
def test_a_broken_connection_gives_the_same_rows_none_twice(hub, tmp_path, kind):
    hub.faults = [Fault("big.jsonl", kind, sent_bytes) for sent_bytes in (70_000, 0, 30_000)]
    done = fetch(hub, tmp_path, streamed_source(files="big.jsonl", max_bytes=200_000))
    assert done.returncode == 0, done.stderr
    assert hub.repos["datasets/team/data"]["big.jsonl"].startswith(rows_of(tmp_path))
    assert len(rows_of(tmp_path)) == 197 * 1013
    if kind == "cut":
        ranges = [request.range for request in hub.of("big.jsonl") if request.path.startswith("cdn/")]
        assert ranges == [
            "bytes=0-131071",
            "bytes=70000-131071",
            "bytes=70000-131071",
            "bytes=100000-131071",
            "bytes=131072-393215",
        ]


def test_a_parquet_file_gives_its_first_rows_as_json_and_is_not_read_to_its_end(hub, tmp_path):
    assert fetch(hub, tmp_path, streamed_source(files="*.parquet", max_rows=10)).returncode == 0
    rows = [json.loads(line) for line in rows_of(tmp_path).splitlines()]
    assert rows == [{"n": i, "text": NOISE[i * 200 : i * 200 + 200].decode()} for i in range(10)]
    size_bytes = len(hub.repos["datasets/team/data"]["table.parquet"])
    assert sent(hub, "table.parquet") < size_bytes / 2
    assert fetch(hub, tmp_path, streamed_source(files="*.parquet", max_rows=10**6)).returncode == 0
    rows = [json.loads(line) for line in rows_of(tmp_path).splitlines()]
    assert [row["n"] for row in rows] == list(range(30_000))
    assert "".join(row["text"] for row in rows) == NOISE[:6_000_000].decode()


def test_lines_pass_through_as_they_are_and_blank_ones_are_no_rows(hub, tmp_path):
    assert fetch(hub, tmp_path, streamed_source(files="odd.jsonl", max_rows=100)).returncode == 0
    assert rows_of(tmp_path) == b'{"a": 1}\n{broken\n\xff\xfe\nlast without newline\n'


def test_what_cannot_be_streamed_is_an_error_and_leaves_no_rows(hub, tmp_path):
    cases = [
        ({"files": "big.jsonl", "max_bytes": 100}, "no row fits into max_bytes (100)\n"),
        ({"files": "*.txt", "max_rows": 1}, "note.txt cannot be streamed, only .jsonl, .json, .ndjson, .jsonl.gz, "),
        ({"files": "list.json", "max_rows": 1}, "list.json is not JSON lines: it is a list, or has a line of more "),
        ({"files": "odd.jsonl", "max_rows": 9}, "odd.jsonl has hash "),
        ({"files": "en/*", "max_rows": 9}, "en/c.0000.json.gz is damaged: Not a gzipped file"),
        ({"files": "table*", "max_rows": 9}, "table.parquet is damaged: Couldn't deserialize thrift"),
        ({"files": "whole.jsonl", "max_rows": 9}, "whole.jsonl was not sent by range (asked for bytes 0-"),
        ({"files": "big.jsonl", "max_rows": 9}, "the Hub does not answer, try after try: "),
    ]
    hub.repos["datasets/team/data"]["whole.jsonl"] = b"{}\n" * 9
    corrupt = [Fault(name, "corrupt", times=9) for name in ("odd.jsonl", "c.0000.json.gz", "table.parquet")]
    hub.faults = [*corrupt, Fault("whole.jsonl", "whole")]
    errors = fetch_each(hub, tmp_path, *(streamed_source(**change) for change, _ in cases[:-1]))
    hub.faults = [Fault("big.jsonl", "cut", 0, 99)]
    errors += fetch_each(hub, tmp_path, *(streamed_source(**change) for change, _ in cases[-1:]))
    starts = [errors.find(what) for _, what in cases]
    assert starts == sorted(starts)
    assert starts[0] == 0
    assert errors.count("  remedy: ") == len(cases)
    assert list((tmp_path / "raw/s").iterdir()) == []
