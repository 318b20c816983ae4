"""merged model -> GGUF files of the types asked for, and their logits through llama.cpp."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import torch

from finetune.errors import ExportError
from finetune.export import converter as converter_module
from finetune.export import quantizer
from finetune.io import replacing
from finetune.sections import QuantizeGguf
from finetune.tools import tool_path

OUT_TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
# Bits a weight of each type, from llama.cpp's tools/quantize/README.md (Llama 3.1 8B); K-quants mix types.
BITS_PER_WEIGHT = {"F16": 16, "BF16": 16, "Q8_0": 8.5, "Q6_K": 6.6, "Q5_K_M": 5.7, "Q4_K_M": 4.9, "Q3_K_M": 4.0}
DISK_MARGIN = 1.05
LOG_LINES = 15


def check_disk(parameters: int, whole_bits: int, types: Sequence[str], folder: Path) -> None:
    """Refuse, before anything is written, a disk too small for the whole GGUF and all files made from it."""
    bits = parameters * (whole_bits + sum(BITS_PER_WEIGHT[name] for name in types))
    needed_bytes, free_bytes = int(bits / 8 * DISK_MARGIN), shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise ExportError(
            f"the GGUF files need about {needed_bytes:,} bytes, and {free_bytes:,} are free",
            folder,
            f"free at least {needed_bytes - free_bytes:,} bytes there, or ask for fewer quantize_gguf.types",
        )


def convert(merged: Path, target: Path, out_type: str, name: str) -> None:
    """Write `merged` as one GGUF of `out_type` (f32, f16, bf16), named `name` inside (never after its folder)."""
    converter = tool_path("convert")
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


def check_budgets(settings: QuantizeGguf, measured: dict[str, Any]) -> None:
    """Raise ExportError for the first type whose perplexity ratio is above its budget."""
    for entry in settings.types:
        ratio = measured[entry.type]["perplexity_ratio"]
        if ratio > entry.max_perplexity_ratio:
            raise ExportError(
                f"{entry.type} raises perplexity by a factor of {ratio:.4f}, more than {entry.max_perplexity_ratio}",
                "quantize_gguf.types",
                "raise its max_perplexity_ratio, or drop the type from the list",
            )
