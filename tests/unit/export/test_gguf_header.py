"""The header of a GGUF against the gguf package's own reader, and files that are not whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFReader
from tiny_models import write_byte_level, write_vocabulary

from finetune.errors import ExportError
from finetune.export.gguf_header import read_header, read_tensors
from finetune.export.gguf_vocab import open_vocab


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("header")
    write_byte_level(folder, "gpt-2")
    write_vocabulary(folder / "x.gguf", folder, "gpt-2", finetune__recipe="été\n", finetune__rows=7)
    return (folder / "x.gguf").read_bytes()


def test_the_metadata_is_that_of_the_gguf_package(whole: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(whole)
    reader, header = GGUFReader(file), read_header(file)
    assert {key for key in reader.fields if not key.startswith("GGUF.")} == set(header)
    for key in ("general.architecture", "tokenizer.ggml.tokens", "tokenizer.ggml.merges", "finetune.recipe"):
        assert header[key] == reader.fields[key].contents()
    assert (header["finetune.recipe"], header["finetune.rows"]) == ("été\n", 7)
    assert header["tokenizer.ggml.token_type"] is None
    assert header["tokenizer.ggml.add_bos_token"] is False
    assert [(each.name, each.type_name, each.shape) for each in read_tensors(file)] == [
        (each.name, each.tensor_type.name, tuple(each.shape)) for each in reader.tensors
    ]


@pytest.mark.parametrize(
    ("kept", "what"),
    [
        (0, "the file is empty"),
        (3, r"not a GGUF: it begins with b'GGU'"),
        (6, "header is cut short or damaged"),
        (20, "header is cut short or damaged"),
        (5000, "header is cut short or damaged"),
        (-1, r"cut short: its tensors end at byte [\d,]+, the file has [\d,]+ bytes"),
        (-40000, "cut short: its tensors end at byte"),
    ],
)
def test_a_cut_file_is_refused_with_the_place(whole: bytes, tmp_path: Path, kept: int, what: str) -> None:
    file = tmp_path / "cut.gguf"
    file.write_bytes(whole[:kept])
    for read in (read_header, open_vocab):
        with pytest.raises(ExportError, match=what) as caught:
            read(file)
        assert "sha256sum" in caught.value.remedy or "ends in .gguf" in caught.value.remedy


def test_other_files_and_versions_are_refused(whole: bytes, tmp_path: Path) -> None:
    file = tmp_path / "other.gguf"
    with pytest.raises(ExportError, match="the GGUF file is missing"):
        read_header(file)
    file.write_bytes(b"GGUF\x02\x00\x00\x00" + whole[8:])
    with pytest.raises(ExportError, match="GGUF version 2, this program reads 3"):
        read_header(file)
    # A length that would be read far beyond the end.
    file.write_bytes(whole[:24] + b"\xff" * 8 + whole[32:])
    with pytest.raises(ExportError, match="damaged"):
        read_header(file)
