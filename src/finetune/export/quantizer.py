"""GGUF -> quantised GGUF through the llama.cpp binding; a process of its own, as a fault in C would end the stage's.

llama.cpp's log goes to stdout: a line for each tensor, and the reason when it refuses.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from safetensors.numpy import load_file

FILE_TYPES = {
    "F16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
    "BF16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q6_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q6_K,
    "Q5_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_K_M,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q3_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q3_K_M,
}
# The keys that llama.cpp's own llama-quantize writes for a file made with an importance matrix.
DATASET_KEY, ENTRIES_KEY = b"quantize.imatrix.dataset", b"quantize.imatrix.entries_count"
DATASET = b"training rows of this model"


def write_log(_level: int, text: bytes, _data: ctypes.c_void_p) -> None:
    """Pass llama.cpp's log on, piece by piece."""
    sys.stdout.write(text.decode("utf-8", "replace"))
    sys.stdout.flush()


def importance_entries(matrix: Mapping[str, Any]) -> Any:
    """The matrix (name -> float32 array [columns]) as llama.cpp reads it: entries that end with one without a name.

    The entries point into the arrays, which must outlive them.
    """
    entries = (llama_cpp.llama_model_imatrix_data * (len(matrix) + 1))()
    for entry, (name, values) in zip(entries, sorted(matrix.items()), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return entries


def matrix_keys(entries: int) -> Any:
    """Metadata that says in the file itself that it was made with an importance matrix of so many tensors."""
    keys = (llama_cpp.llama_model_kv_override * 3)()
    keys[0].tag, keys[0].key, keys[0].value.val_str = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR, DATASET_KEY, DATASET
    keys[1].tag, keys[1].key, keys[1].value.val_i64 = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT, ENTRIES_KEY, entries
    return keys


def main(source: str, target: str, file_type: str, threads: int, matrix_file: str) -> int:
    """Quantise `source` into `target`; returns llama.cpp's code, 0 for success.

    `matrix_file`: a safetensors file of the importance matrix, or an empty string for none.
    """
    log = llama_cpp.llama_log_callback(write_log)
    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = FILE_TYPES[file_type]
    settings.nthread = threads
    matrix = load_file(Path(matrix_file)) if matrix_file else {}
    matrix = {name: np.ascontiguousarray(values, dtype=np.float32) for name, values in matrix.items()}
    entries, keys = importance_entries(matrix), matrix_keys(len(matrix))
    if matrix:
        settings.imatrix, settings.kv_overrides = entries, keys
    return int(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5]))
