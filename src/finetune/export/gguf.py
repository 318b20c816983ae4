"""merged model -> GGUF files of the types asked for, and their logits and answers through llama.cpp."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import llama_cpp
import torch
from safetensors.numpy import save_file

from finetune.errors import ExportError
from finetune.export import converter, quantizer
from finetune.export.child import run_module, sigterm_as_exit
from finetune.export.converter import KeyValues
from finetune.export.gguf_types import PLAIN_TYPES, check_quantized, tensor_types
from finetune.export.memory import free_memory_bytes
from finetune.io import replacing
from finetune.log import progress_bar
from finetune.sections import QuantizeGguf
from finetune.tools import tool_path

# What a GGUF can be asked for: logits [tokens, vocabulary] of ids, and a continuation (ids, most new tokens, ends).
Llama = tuple[Callable[[list[int]], torch.Tensor], Callable[[list[int], int, Collection[int]], list[int]]]
OUT_TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
# Bits a weight of each type, from llama.cpp's tools/quantize/README.md (Llama 3.1 8B); K-quants mix types.
BITS_PER_WEIGHT = {"F16": 16, "BF16": 16, "Q8_0": 8.5, "Q6_K": 6.6, "Q5_K_M": 5.7, "Q4_K_M": 4.9, "Q3_K_M": 4.0}
DISK_MARGIN = 1.05
CONVERTED = re.compile(r"Writing: +(\d+)%")
QUANTIZED = re.compile(r"\[ *(\d+)/ *(\d+)\]")


def plan_files(folder: Path, settings: QuantizeGguf, parameters: int, whole_bits: int) -> dict[str, Path]:
    """The file of each type that is asked for, in the order of params.yaml, in `folder`, which is made.

    Raises ExportError when the disk cannot hold them beside the whole GGUF.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_disk(parameters, whole_bits, [entry.type for entry in settings.types], folder)
    return {entry.type: folder / f"model-{entry.type}.gguf" for entry in settings.types}


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


def reference_dtype(parameters: int, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """How the merged model is held to measure the files beside it: float32 on a CPU, its own dtype on a GPU.

    Raises ExportError, before hours of work, when a CPU's free memory cannot hold it.
    """
    if device.type != "cpu":
        return dtype
    needed_bytes, free_bytes = parameters * torch.float32.itemsize, free_memory_bytes()
    if free_bytes < needed_bytes:
        raise ExportError(
            f"the merged model needs {needed_bytes:,} bytes of memory in float32, and {free_bytes:,} are free",
            "quantize_gguf",
            "run the stage on a machine with a GPU or with more memory",
        )
    return torch.float32


@contextmanager
def whole_gguf(merged: Path, folder: Path, dtype: str, name: str, metadata: KeyValues) -> Iterator[Path]:
    """Convert `merged` into one GGUF in its own dtype inside `folder`, and remove it at the end of the block.

    Ctrl-C and SIGTERM end the block too, and leave no half-written file.
    """
    whole = folder / ".whole.gguf"
    with sigterm_as_exit():
        try:
            convert(merged, whole, OUT_TYPES[dtype], name, metadata)
            yield whole
        finally:
            whole.unlink(missing_ok=True)


def convert(merged: Path, target: Path, out_type: str, name: str, metadata: KeyValues | None = None) -> None:
    """Write `merged` as one GGUF of `out_type` (f32, f16, bf16), named `name` inside (never after its folder).

    `metadata`: further keys of the file, such as its provenance. Raises ExportError for a tokenizer that llama.cpp
    cannot follow.
    """
    folder = tool_path("convert")
    with (
        tempfile.TemporaryDirectory(prefix="finetune-convert-") as keys,
        replacing(target) as temporary,
        progress_bar(100, 0, "%", f"GGUF {out_type}") as bar,
    ):
        arguments = converter.converter_arguments(merged, temporary, out_type, name, metadata or {}, Path(keys))

        def show(line: str) -> None:
            if found := CONVERTED.search(line):
                bar.update(int(found[1]) - bar.n)

        run_module(converter.__name__, [folder, *arguments], target, show)


def quantize(
    source: Path, target: Path, file_type: str, threads: int, importance: Mapping[str, Any] | None = None
) -> None:
    """Quantise a 16 or 32 bit GGUF; the target appears whole or not at all.

    `importance`: float32 array [columns] for each matrix of the blocks, see export/importance.py; only the K types
    have a use for it.
    Raises ExportError for a source that is the target, is quantised already, or cannot be read, and for a target that
    the shape of the model keeps from being quantised (see `fallbacks`).
    """
    if source.resolve() == target.resolve():
        raise ExportError("source and target are the same file", source, "give the target another name")
    if found := sorted(set(tensor_types(source)) - PLAIN_TYPES):
        raise ExportError(
            f"the source holds {', '.join(found)}: quantising it again would lose twice",
            source,
            "quantise from the GGUF of the merged model in 16 or 32 bit",
        )
    with (
        tempfile.TemporaryDirectory(prefix="finetune-importance-") as folder,
        replacing(target) as temporary,
        progress_bar(None, 0, "tensor", file_type) as bar,
    ):
        matrix_file = Path(folder) / "importance.safetensors" if importance and "_K" in file_type else ""
        if importance and matrix_file:
            save_file(dict(importance), matrix_file)

        def show(line: str) -> None:
            if found := QUANTIZED.match(line):
                bar.total = int(found[2])
                bar.update(int(found[1]) - bar.n)

        run_module(quantizer.__name__, [source, temporary, file_type, threads, matrix_file], target, show)
        check_quantized(temporary, file_type, target)


def memory_groups(files: Mapping[str, Path], context_tokens: int, vocabulary: int) -> list[dict[str, Path]]:
    """The files in groups that fit into half of the free memory together, in their order; at least one in each.

    A file counts with the logits of one row, which exist twice while they are copied. The files of a group are
    measured in one pass of the merged model.
    """
    left_bytes = free_bytes = free_memory_bytes() // 2
    groups: list[dict[str, Path]] = []
    for name, file in files.items():
        needed_bytes = file.stat().st_size + 2 * 4 * context_tokens * vocabulary
        if not groups or needed_bytes > left_bytes:
            groups.append({})
            left_bytes = free_bytes
        groups[-1][name] = file
        left_bytes -= needed_bytes
    return groups


def opened_groups(
    files: Mapping[str, Path], context_tokens: int, vocabulary: int, threads: int
) -> Iterator[AbstractContextManager[dict[str, Llama]]]:
    """For each of the `memory_groups`, its files in llama.cpp while the block of a `with` statement runs."""
    return (opened(group, context_tokens, threads) for group in memory_groups(files, context_tokens, vocabulary))


@contextmanager
def opened(files: Mapping[str, Path], context_tokens: int, threads: int) -> Iterator[dict[str, Llama]]:
    """The files in llama.cpp, closed at the end of the block."""
    with ExitStack() as stack:
        models = {
            name: stack.enter_context(closing(load(file, context_tokens, threads))) for name, file in files.items()
        }
        yield {name: (llama_logits(model), partial(greedy_ids, model)) for name, model in models.items()}


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


def greedy_ids(model: llama_cpp.Llama, ids: list[int], max_new_tokens: int, ends: Collection[int]) -> list[int]:
    """The most likely continuation of `ids`, up to and with one of `ends`, or as far as there is room."""
    # The context that was asked for: llama.cpp rounds it up, and has no logits of what lies beyond.
    most = min(max_new_tokens, len(model.scores) - len(ids))
    made: list[int] = []
    model.reset()
    while len(made) < most and not (made and made[-1] in ends):
        model.eval(made[-1:] or ids)
        made.append(int(model.scores[model.n_tokens - 1].argmax()))
    return made
