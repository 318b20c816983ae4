"""GGUF -> quantised GGUF through the llama.cpp binding; a process of its own, as a fault in C would end the stage's."""

from __future__ import annotations

import ctypes
import sys

import llama_cpp

FILE_TYPES = {
    "F16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
    "BF16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q6_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q6_K,
    "Q5_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_K_M,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q3_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q3_K_M,
}


def main(source: str, target: str, file_type: str, threads: int) -> int:
    """Quantise `source` into `target`; returns llama.cpp's code, 0 for success, its log going to stderr."""
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = FILE_TYPES[file_type]
    settings.nthread = threads
    return int(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))
