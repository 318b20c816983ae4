from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from finetune.errors import ExportError
from finetune.export import weights
from finetune.export.weights import (
    Blocks,
    Planned,
    Workers,
    count_parameters,
    opened,
    rows_per_block,
    shards_of,
    write_file,
)

TENSORS = {
    "z": torch.arange(6, dtype=torch.float32).view(2, 3),
    "a.b": torch.arange(30, dtype=torch.bfloat16).view(5, 6),
    "half": torch.arange(4, dtype=torch.float16),
    "number": torch.tensor(7, dtype=torch.int64),
    "flags": torch.tensor([True, False, True]),
    "octets": torch.arange(5, dtype=torch.uint8),
    "é": torch.zeros(0, 3),
}


def write(target: Path, tensors: dict[str, torch.Tensor], threads: int) -> list[str]:
    """Write tensors through the planner, three values at a time."""

    def prepare(tensor: torch.Tensor) -> Blocks:
        return Blocks(tensor.numel(), 1, 3, lambda first, last: tensor.flatten()[first:last].clone())

    planned = {
        name: Planned(name, tensor.dtype, tuple(tensor.shape), partial(prepare, tensor))
        for name, tensor in tensors.items()
    }
    names: list[str] = []
    with ThreadPoolExecutor(threads) as pool:
        finish = write_file(target, planned, Workers(pool, threads), lambda tensor: names.append(tensor.name))
    assert not target.exists()
    finish()
    return names


@pytest.mark.parametrize("threads", [1, 4])
def test_a_file_has_the_bytes_that_safetensors_would_write(threads: int, tmp_path: Path) -> None:
    names = write(tmp_path / "ours.safetensors", TENSORS, threads)
    assert (tmp_path / "ours.safetensors").read_bytes() == save(TENSORS, metadata={"format": "pt"})
    assert names == ["number", "z", "é", "a.b", "half", "octets", "flags"]
    for name, tensor in load_file(tmp_path / "ours.safetensors").items():
        assert torch.equal(tensor, TENSORS[name])
    assert list(tmp_path.iterdir()) == [tmp_path / "ours.safetensors"]


def test_a_file_is_read_in_parts(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with opened(tmp_path / "model.safetensors") as stored:
        assert list(stored) == sorted(TENSORS)
        assert torch.equal(stored["a.b"].read(4, 9), torch.tensor([4, 5, 6, 7, 8], dtype=torch.bfloat16))
        for name, tensor in TENSORS.items():
            assert torch.equal(stored[name].whole(), tensor)
    assert count_parameters(tmp_path) == 6 + 30 + 4 + 1 + 3 + 5


def test_a_fault_while_writing_leaves_no_file(tmp_path: Path) -> None:
    def fail(first: int, last: int) -> torch.Tensor:
        raise ExportError("bad", "weight", "none")

    planned = {"w": Planned("w", torch.float32, (4,), lambda: Blocks(4, 1, 2, fail))}
    with pytest.raises(ExportError, match="bad"), ThreadPoolExecutor(2) as pool:
        write_file(tmp_path / "model.safetensors", planned, Workers(pool, 2), lambda tensor: None)
    assert list(tmp_path.iterdir()) == []


def header(entry: dict[str, object]) -> bytes:
    text = json.dumps({"w": entry}).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (save(TENSORS)[:-1], "is cut short: its header names more bytes than it has"),
        (b"\x10", "is no safetensors file, or is cut short"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is no safetensors file, or is cut short"),
        ((40).to_bytes(8, "little") + b"{" * 40, "is no safetensors file, or is cut short"),
        (
            header({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}) + b"\0" * 4,
            r"is damaged: w has 4 bytes for the shape \(2,\)",
        ),
        (
            header({"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}) + b"\0" * 4,
            "holds w as F8_E4M3, which no sum can be made with",
        ),
    ],
    ids=["short", "byte", "pointer", "braces", "size", "dtype"],
)
def test_a_file_that_cannot_be_merged_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ExportError, match=message), opened(tmp_path / "model.safetensors"):
        pass


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(1000)}, file)
    with opened(file) as stored:
        with file.open("r+b") as handle:
            handle.truncate(2000)
        with pytest.raises(EOFError, match="became shorter than 2000 bytes"):
            stored["w"].whole()


@pytest.mark.parametrize(
    ("width", "multiple_of", "rows"), [(1, 1, 100), (30, 1, 3), (101, 1, 1), (10, 4, 8), (10, 64, 64)]
)
def test_blocks_hold_whole_rows(width: int, multiple_of: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "BLOCK_VALUES", 100)
    assert rows_per_block(width, multiple_of) == rows


def test_a_base_without_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no model\.safetensors, nor an index of shards"):
        shards_of(tmp_path)
