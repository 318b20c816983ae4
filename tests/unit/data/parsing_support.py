"""Sources and raw files for the tests of the parsers."""

from finetune.data.reading.formats import chunks, parse_chunk
from finetune.data.rows import Fault, Parsed, Skipped
from finetune.source_sections import Source


def source(format_name, **given):
    keys = {
        "name": "s",
        "format": format_name,
        "use": "training",
        "origin": {"kind": "local", "files": "x"},
        "license": "MIT",
        "language": None,
        "columns": {},
        "filters": [],
        "group_characters": None,
        "prompt": None,
        "paths": "best" if format_name == "message_tree" else None,
        **given,
    }
    return Source(**keys)


def parse(folder, file, content, described):
    """The rows of a file with that content, over all its chunks."""
    (folder / file).write_bytes(content)
    return [row for chunk in chunks(folder, file, described) for row in parse_chunk(folder, chunk, described)]


def turns(row):
    assert isinstance(row, Parsed), row
    return [(message.role, message.tool_calls or message.content) for message in row.record.messages]


def outcome(row):
    """`parsed`, or the reason that the row is none."""
    return row.reason if isinstance(row, Fault | Skipped) else "parsed"
