"""safetensors files <-> values in blocks: a header read or written first, then bytes at their places.

safetensors' own writer (0.8) takes the addresses of all tensors of a file at once, so that it needs a file's size in
memory. The format is a length, a JSON header and the bytes: https://huggingface.co/docs/safetensors. A file written
here has the bytes that safetensors' writer would give it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from finetune.errors import ExportError
from finetune.io import read_json, replacing

INDEX, ONE_FILE = "model.safetensors.index.json", "model.safetensors"
# In the order that safetensors writes them in: no tensor then lies askew.
DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
# Values computed at a time: a block and its float32 copies stay in the cache of one core (2 MiB). A larger one leaves
# it, and of smaller ones the calls cost more.
BLOCK_VALUES = 1 << 18
REMAKE = (
    "dvc repro --force --single-item STAGE: fetch for a base model of the Hub, else the stage that makes this folder"
)


@dataclass(frozen=True)
class Stored:
    """A tensor in an open file: dtype, shape, the file's descriptor, and the place of the tensor's first byte."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    descriptor: int
    offset: int

    @property
    def count(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    def read(self, first: int, last: int) -> torch.Tensor:
        """The values from `first` to before `last`, counted in the order of the file."""
        values = torch.empty(last - first, dtype=self.dtype)
        view, place = _bytes_of(values), self.offset + first * self.dtype.itemsize
        while view:
            done = os.preadv(self.descriptor, [view], place)
            if done == 0:
                raise EOFError(f"a weight file became shorter than {place} bytes while it was read")
            view, place = view[done:], place + done
        return values

    def whole(self) -> torch.Tensor:
        """All values, in their shape."""
        return self.read(0, self.count).view(self.shape)


@dataclass(frozen=True)
class Workers:
    """Threads that take numbers from one list, so that a number costs no more than a call."""

    pool: ThreadPoolExecutor
    threads: int

    def run(self, work: Callable[[int], None], numbers: Sequence[int]) -> None:
        """Do `work` for each number; raises what a thread raised, when all are done."""
        # Threads may share an iterator over a range: its next() is one step of the interpreter.
        waiting = iter(numbers)

        def until_none_is_left() -> None:
            for number in waiting:
                work(number)

        wait(futures := [self.pool.submit(until_none_is_left) for _ in range(min(self.threads, len(numbers)))])
        for future in futures:
            future.result()


@dataclass(frozen=True)
class Blocks:
    """A tensor computed as `rows` rows of `width` values, `step` rows at a time: `compute(first, last)`, flat."""

    rows: int
    width: int
    step: int
    compute: Callable[[int, int], torch.Tensor]

    def each(self, workers: Workers, take: Callable[[int, torch.Tensor], None]) -> None:
        """Give every block to `take` with the number of its first value; several at a time, in no order."""

        def one(first: int) -> None:
            take(first * self.width, self.compute(first, min(first + self.step, self.rows)))

        workers.run(one, range(0, self.rows, self.step))


@dataclass(frozen=True)
class Planned:
    """A tensor to come, by its name in the model: what a header says of it; `prepare` reads what its blocks need."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    prepare: Callable[[], Blocks]

    @property
    def size_bytes(self) -> int:
        """Its size in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


def rows_per_block(width: int, multiple_of: int = 1) -> int:
    """How many rows of `width` values are computed at a time, at least one `multiple_of`."""
    return max(1, BLOCK_VALUES // (width * multiple_of)) * multiple_of


@contextmanager
def opened(file: Path) -> Iterator[dict[str, Stored]]:
    """The tensors of a safetensors file by name, sorted; raises ExportError where it is damaged or cut short."""
    with file.open("rb", buffering=0) as handle:
        size_bytes = int.from_bytes(handle.read(LENGTH_BYTES), "little")
        start, end = LENGTH_BYTES + size_bytes, file.stat().st_size
        try:
            header = json.loads(handle.read(size_bytes)) if 0 < size_bytes <= min(end, MAX_HEADER_BYTES) else None
        except ValueError:
            header = None
        if header is None:
            raise ExportError("is no safetensors file, or is cut short", file, REMAKE)
        header.pop("__metadata__", None)
        stored = {name: _stored(name, header[name], handle.fileno(), start, file) for name in sorted(header)}
        if any(each.offset + each.count * each.dtype.itemsize > end for each in stored.values()):
            raise ExportError("is cut short: its header names more bytes than it has", file, REMAKE)
        yield stored


def _stored(name: str, entry: Mapping[str, Any], descriptor: int, start: int, file: Path) -> Stored:
    dtype, shape = DTYPES.get(entry["dtype"]), tuple(entry["shape"])
    if dtype is None:
        raise ExportError(
            f"holds {name} as {entry['dtype']}, which no sum can be made with",
            file,
            "take weights of 16 or 32 bits: for a quantised repository, the one that it was made from",
        )
    first, last = entry["data_offsets"]
    if last - first != math.prod(shape) * dtype.itemsize:
        raise ExportError(f"is damaged: {name} has {last - first} bytes for the shape {shape}", file, REMAKE)
    return Stored(dtype, shape, descriptor, start + first)


def _bytes_of(values: torch.Tensor) -> memoryview:
    return values.view(torch.uint8).numpy().data


def write_file(
    target: Path, tensors: Mapping[str, Planned], workers: Workers, done: Callable[[Planned], None]
) -> Callable[[], None]:
    """Write a safetensors file beside `target`, of `tensors` by their name in it; calls `done` with each.

    Returns what brings the file to the disk and gives it its name, which may be done while the next one is computed.
    Raises what `done` or a block raises, and then leaves no file.
    """
    order = sorted(tensors, key=lambda name: (list(CODES).index(tensors[name].dtype), name))
    places, end = {}, 0
    for name in order:
        places[name], end = (end, end + tensors[name].size_bytes), end + tensors[name].size_bytes
    entries = {
        name: {"dtype": CODES[tensors[name].dtype], "shape": tensors[name].shape, "data_offsets": places[name]}
        for name in order
    }
    header = json.dumps(
        {"__metadata__": {"format": "pt"}, **entries}, ensure_ascii=False, separators=(",", ":")
    ).encode()
    header += b" " * (-len(header) % LENGTH_BYTES)
    start = LENGTH_BYTES + len(header)
    with ExitStack() as stack:
        temporary = stack.enter_context(replacing(target))
        with temporary.open("wb") as handle:
            handle.write(len(header).to_bytes(LENGTH_BYTES, "little") + header)
            handle.flush()
            for name in order:
                take = _writer(handle.fileno(), start + places[name][0], tensors[name].dtype)
                tensors[name].prepare().each(workers, take)
                done(tensors[name])
        return stack.pop_all().close


def _writer(descriptor: int, start: int, dtype: torch.dtype) -> Callable[[int, torch.Tensor], None]:
    # The kernel lets one write at a time into a file: the other threads had better wait here than there, spinning.
    turn = Lock()

    def write(first: int, values: torch.Tensor) -> None:
        view, place = _bytes_of(values), start + first * dtype.itemsize
        with turn:
            while view:
                done = os.pwrite(descriptor, view, place)
                view, place = view[done:], place + done

    return write


def shards_of(model: Path) -> list[Path]:
    """The weight files that a model's index names, else its one file: other files may lie beside them."""
    if (model / INDEX).is_file():
        return [model / name for name in sorted(set(read_json(model / INDEX)["weight_map"].values()))]
    if (model / ONE_FILE).is_file():
        return [model / ONE_FILE]
    raise ExportError("no model.safetensors, nor an index of shards", model, REMAKE)


def count_parameters(model: Path) -> int:
    """How many values a model's weight files hold; reads their headers only."""
    total = 0
    for shard in shards_of(model):
        with opened(shard) as stored:
            total += sum(each.count for each in stored.values())
    return total
