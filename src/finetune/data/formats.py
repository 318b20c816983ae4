"""Bytes of one raw file -> its rows, by the format that params.yaml declares; a bad row never stops the others."""

from __future__ import annotations

from collections.abc import Iterator

from finetune.data.chatml import parse_chatml
from finetune.data.conversations import parse_messages, parse_sharegpt
from finetune.data.rows import Origin, Row
from finetune.data.table import parse_csv
from finetune.data_sections import ChatSource, CsvSource
from finetune.errors import DataError

BOM = b"\xef\xbb\xbf"


def parse_file(content: bytes, file: str, source: ChatSource | CsvSource) -> Iterator[Row]:
    """Yield one Parsed or Fault per row of a file; `file` is its path relative to data/raw.

    Raises DataError when the file holds nothing, or when a table lacks a named column.
    """
    body = content.removeprefix(BOM)
    if not body.strip():
        raise DataError("file is empty", file, f"give source {source.name} a file with rows, then run `dvc repro`")
    origin = Origin(source.name, file, source.language, len(content) - len(body))
    match source.format:
        case "chatml":
            yield from parse_chatml(body, origin)
        case "messages":
            yield from parse_messages(body, origin)
        case "sharegpt":
            yield from parse_sharegpt(body, origin)
        case "csv":
            yield from parse_csv(body, origin, source)
