"""merged model -> GGUF files of the types asked for, and their logits through llama.cpp."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import gguf
import llama_cpp
import torch

from finetune.errors import ExportError
from finetune.export import converter as converter_module
from finetune.export import quantizer
from finetune.io import replacing

TOOLS = Path(os.environ.get("FINETUNE_TOOLS", ".tools"))
OUT_TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
LOG_LINES = 15


def convert(merged: Path, target: Path, out_type: str, name: str) -> None:
    """Write `merged` as one GGUF of `out_type` (f32, f16, bf16), named `name` inside (never after its folder)."""
    converter = TOOLS / "convert"
    if not (converter / "convert_hf_to_gguf.py").is_file():
        raise ExportError("llama.cpp's converter is not installed", converter, "make setup")
    with replacing(target) as temporary:
        arguments = [merged, "--outfile", temporary, "--outtype", out_type, "--model-name", name]
        _run([converter_module.__name__, converter, *arguments], target)


def quantize(source: Path, target: Path, file_type: str, threads: int) -> None:
    """Quantise a 16 or 32 bit GGUF; the target appears whole or not at all."""
    with replacing(target) as temporary:
        _run([quantizer.__name__, source, temporary, file_type, threads], target)


def _run(command: list[object], target: Path) -> None:
    finished = subprocess.run([sys.executable, "-m", *map(str, command)], capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        tail = "\n".join((finished.stdout + finished.stderr).splitlines()[-LOG_LINES:])
        raise ExportError(
            f"{command[0]} ended with code {finished.returncode}:\n{tail}", target, "mend what the log names"
        )


def tensor_types(path: Path) -> dict[str, int]:
    """How many tensors of each type a GGUF really holds: K-quants fall back where a row is no multiple of 256."""
    counts = Counter(tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors)
    return dict(sorted(counts.items()))


def load(path: Path, context_tokens: int, threads: int) -> llama_cpp.Llama:
    """A GGUF in llama.cpp with logits for every token and a float32 cache, on the CPU, in a fixed order of sums."""
    return llama_cpp.Llama(
        model_path=str(path),
        n_ctx=context_tokens,
        n_batch=512,
        n_ubatch=512,
        n_threads=threads,
        n_threads_batch=threads,
        n_gpu_layers=0,
        logits_all=True,
        flash_attn=False,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )


def llama_logits(model: llama_cpp.Llama) -> Callable[[list[int]], torch.Tensor]:
    """A function from token ids to llama.cpp's logits [tokens, vocabulary]."""

    def logits_of(ids: list[int]) -> torch.Tensor:
        model.reset()
        model.eval(ids)
        return torch.from_numpy(model.scores[: len(ids)].copy())

    return logits_of
