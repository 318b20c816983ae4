"""A GGUF file -> its metadata, read by the specification, after a check that the file is whole.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (version 3, little-endian). The weights are not read: only
that the file is long enough to hold them. It takes as long as the vocabulary: half a second for the 152 thousand
tokens of Qwen 2.5, where the gguf package takes 17 s (benchmarks/gguf_header.py).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType

from finetune.errors import ExportError

MAGIC, VERSION = b"GGUF", 3
# Value types by their number in the file; 8 is a text, 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
ALIGNMENT_KEY = "general.alignment"
AGAIN = "copy the file again and compare `sha256sum` with the original, or make it again with `dvc repro`"


@dataclass
class _Cursor:
    """A place in the bytes of a header; reading a number beyond their end raises struct.error."""

    content: mmap.mmap
    at: int

    def number(self, form: str) -> Any:
        """The next number, of a format character of the struct module."""
        value = struct.unpack_from(f"<{form}", self.content, self.at)[0]
        self.at += struct.calcsize(f"<{form}")
        return value

    def text(self) -> str:
        """The next text: its length in bytes, then UTF-8, where other bytes are replaced."""
        size_bytes = self.number("Q")
        start, self.at = self.at, self.at + size_bytes
        return self.content[start : self.at].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """The next value of a type by its number; an array of numbers is passed over and given as None."""
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            return self.number(SCALARS[kind])
        element, count = self.number("I"), self.number("Q")
        if element in (TEXT, ARRAY):
            return [self.value(element) for _ in range(count)]
        self.at += count * struct.calcsize(f"<{SCALARS[element]}")
        return None


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in the header: its name, its type such as "Q8_0", and its shape, the length of a row first."""

    name: str
    type_name: str
    shape: tuple[int, ...]


def read_header(path: Path) -> Mapping[str, Any]:
    """The metadata of a whole GGUF: numbers, texts and lists of texts by key; arrays of numbers are None.

    Raises ExportError as `read_tensors` does.
    """
    return _read_whole(path)[0]


def read_tensors(path: Path) -> Sequence[TensorEntry]:
    """The tensors of a whole GGUF, in the file's order.

    Raises ExportError for a file that is missing, empty, not a GGUF of this version, or cut short in its header or in
    the data of its tensors.
    """
    return _read_whole(path)[1]


def _read_whole(path: Path) -> tuple[dict[str, Any], list[TensorEntry]]:
    if not path.is_file():
        raise ExportError("the GGUF file is missing", path, "mend the path, or make it with `dvc repro quantize_gguf`")
    size_bytes = path.stat().st_size
    if size_bytes == 0:
        raise ExportError("the file is empty", path, AGAIN)
    with path.open("rb") as handle:
        if (magic := handle.read(len(MAGIC))) != MAGIC:
            raise ExportError(f"not a GGUF: it begins with {magic!r}", path, "name a file that ends in .gguf")
        with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                metadata, entries, needed_bytes = _read(_Cursor(content, len(MAGIC)), path)
            except (struct.error, KeyError, OverflowError, MemoryError, ValueError) as fault:
                raise ExportError(f"the GGUF's header is cut short or damaged: {fault}", path, AGAIN) from None
    if size_bytes < needed_bytes:
        raise ExportError(
            f"the GGUF is cut short: its tensors end at byte {needed_bytes:,}, the file has {size_bytes:,} bytes",
            path,
            AGAIN,
        )
    return metadata, entries


def _read(cursor: _Cursor, path: Path) -> tuple[dict[str, Any], list[TensorEntry], int]:
    """The metadata, the tensors, and the least number of bytes that a whole file of this header has."""
    if (version := cursor.number("I")) != VERSION:
        raise ExportError(f"GGUF version {version}, this program reads {VERSION}", path, "convert the model again")
    tensors, keys = cursor.number("Q"), cursor.number("Q")
    metadata = {}
    for _ in range(keys):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.number("I"))
    entries, end_bytes = [], 0
    for _ in range(tensors):
        name, shape = cursor.text(), tuple(cursor.number("Q") for _ in range(cursor.number("I")))
        kind = GGMLQuantizationType(cursor.number("I"))
        entries.append(TensorEntry(name, kind.name, shape))
        block_values, block_bytes = GGML_QUANT_SIZES[kind]
        end_bytes = max(end_bytes, cursor.number("Q") + prod(shape) // block_values * block_bytes)
    alignment = metadata.get(ALIGNMENT_KEY, GGUF_DEFAULT_ALIGNMENT)
    data_start = -(-cursor.at // alignment) * alignment
    return metadata, entries, data_start + end_bytes if tensors else cursor.at
