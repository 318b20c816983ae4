"""A GGUF file -> the types that its tensors really have, and those that are not what the file's name says."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

from finetune.errors import ExportError
from finetune.export.gguf_header import read_tensors
from finetune.io import sha256_file
from finetune.log import logger

# A row is cut into blocks of this many values; one that is no multiple is stored in another type.
BLOCK_VALUES = {"F16": 1, "BF16": 1, "Q8_0": 32, "Q6_K": 256, "Q5_K_M": 256, "Q4_K_M": 256, "Q3_K_M": 256}
PLAIN_TYPES = {"F32", "F16", "BF16"}
MAX_PLAIN_SHARE = 0.5


def tensor_types(path: Path) -> dict[str, int]:
    """How many tensors of each type a GGUF really holds; raises ExportError when it is missing or damaged."""
    counts = Counter(tensor.type_name for tensor in read_tensors(path))
    return dict(sorted(counts.items()))


def fallbacks(path: Path, file_type: str) -> dict[str, int]:
    """The tensors that could not have a type of `file_type`, counted by name (layer numbers as *) and type obtained.

    llama.cpp stores a matrix whose rows are no multiple of the type's block in a larger type with smaller blocks, and
    in F16 when they are no multiple of 32 either (src/llama-quant.cpp, tensor_type_fallback). Norms and other tensors
    that stay in F32 are not meant to be quantised.
    """
    block = BLOCK_VALUES[file_type]
    kinds = (
        f"{re.sub(r'[.][0-9]+[.]', '.*.', tensor.name)} {tensor.type_name}"
        for tensor in read_tensors(path)
        if tensor.type_name != "F32" and tensor.shape[0] % block
    )
    return dict(sorted(Counter(kinds).items()))


def describe(path: Path, file_type: str) -> dict[str, Any]:
    """Size, SHA-256 and tensor types of a file, and what could not have a type of `file_type`; warns of the latter."""
    fallen = fallbacks(path, file_type)
    if fallen:
        logger.warning(
            "%s: %d tensors have another type, as their rows are no multiple of %d: %s",
            path.name,
            sum(fallen.values()),
            BLOCK_VALUES[file_type],
            ", ".join(f"{count} x {name}" for name, count in fallen.items()),
        )
    return {
        "size_bytes": path.stat().st_size,
        "sha256": sha256_file(path),
        "tensor_types": tensor_types(path),
        "fallback_tensors": sum(fallen.values()),
        "fallbacks": fallen,
    }


def check_quantized(path: Path, file_type: str, where: Path) -> None:
    """Raise ExportError when more than half of a quantised file's values stayed in 16 bit for their shape.

    A larger quantised type in place of the one asked for costs size and no quality: that is counted, not refused.
    """
    block, tensors = BLOCK_VALUES[file_type], read_tensors(path)
    plain = [each for each in tensors if each.type_name in PLAIN_TYPES - {"F32"} and each.shape[0] % block]
    share = sum(math.prod(each.shape) for each in plain) / sum(math.prod(each.shape) for each in tensors)
    if share > MAX_PLAIN_SHARE:
        raise ExportError(
            f"{share:.0%} of the values of {file_type} stayed in 16 bit: rows such as the {plain[0].shape[0]} of "
            f"{plain[0].name} are no multiple of 32",
            where,
            f"ask for F16 in place of {file_type} in quantize_gguf.types",
        )
