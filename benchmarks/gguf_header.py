"""The header of a GGUF with Qwen 2.5's vocabulary, read by export/gguf_header.py and by the gguf package.

`python benchmarks/gguf_header.py`: no download, 7 MB in a temporary folder, half a minute. Writes gguf_header.json.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFWriter
from process_tree import machine

from finetune.export.gguf_header import read_header
from finetune.io import write_json

RESULT = Path(__file__).with_suffix(".json")
# Of Qwen/Qwen2.5-0.5B.
TOKENS, MERGES = 151_936, 151_387
ROUNDS = 3


def write_vocabulary(path: Path) -> None:
    """A GGUF with as many tokens, types and merges, and one small tensor."""
    writer = GGUFWriter(str(path), "qwen2")
    writer.add_token_list([f"token {number}" for number in range(TOKENS)])
    writer.add_token_types([1] * TOKENS)
    writer.add_token_merges([f"left{number} right{number}" for number in range(MERGES)])
    writer.add_tensor("token_embd.weight", np.ones((1, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def median_s(read: Callable[[Path], Any], path: Path) -> float:
    """Median seconds of one reading."""
    times = []
    for _ in range(ROUNDS):
        started_s = time.perf_counter()
        read(path)
        times.append(time.perf_counter() - started_s)
    return round(statistics.median(times), 2)


def main() -> None:
    """Measure both readers on the same file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        write_vocabulary(path)
        figures = {"read_header_s": median_s(read_header, path), "gguf_package_s": median_s(GGUFReader, path)}
    write_json(RESULT, {"machine": machine(), "tokens": TOKENS, "merges": MERGES, "rounds": ROUNDS, **figures})


if __name__ == "__main__":
    main()
