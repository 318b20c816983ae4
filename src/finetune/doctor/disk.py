"""params.yaml + the base's size -> the bytes that a whole run writes, by disk, against what is free there.

All stages are counted, and what earlier runs left in DVC's cache is not: an upper bound. The data stages are left out:
fetch checks its own room, and what cleaning keeps is not known before.
"""

from __future__ import annotations

import configparser
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.data_sections import HubBase
from finetune.doctor.result import Result, fault, gib, ok, warning
from finetune.params import Params
from finetune.sections import ScratchModel

# Parameters of base models that the recipes name, as their pages on the Hub count them.
KNOWN_PARAMETERS = {
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "openai-community/gpt2": 124_439_808,
}
# As in finetune/export/gguf.py, whose import takes seconds; a test holds the two together.
GGUF_BITS = {"F16": 16, "BF16": 16, "Q8_0": 8.5, "Q6_K": 6.6, "Q5_K_M": 5.7, "Q4_K_M": 4.9, "Q3_K_M": 4.0}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
HUB_BYTES_PER_PARAMETER = 2
# Keys for the converter, an importance matrix, the Go compiler's cache: estimated, not measured.
TEMPORARY_BYTES = 256 << 20
# What is left free below this share of the need is too close to call.
MARGIN = 1.1


@dataclass(frozen=True)
class Size:
    """How many parameters the base has, and how that is known; None: it is not known."""

    parameters: int | None
    known_from: str


@dataclass(frozen=True)
class Need:
    """What is written where; None: it is not known how much."""

    what: str
    size_bytes: int | None
    place: str


@dataclass(frozen=True)
class Disk:
    """The disk of a place: the same number for places on one disk, and its free bytes."""

    number: int
    free_bytes: int


def scratch_parameters(shape: ScratchModel, vocabulary: int) -> int:
    """Weights of the Llama that the base stage makes."""
    hidden, share = shape.hidden_size, shape.key_value_heads / shape.attention_heads
    attention = 2 * hidden**2 + 2 * int(hidden**2 * share)
    layer = attention + 3 * hidden * shape.intermediate_size + 2 * hidden
    tables = (1 if shape.tie_embeddings else 2) * vocabulary * hidden
    return shape.layers * layer + tables + hidden


def size_of_base(params: Params, cached_bytes: int | None) -> Size:
    """The base's size. `cached_bytes`: of its safetensors in the Hub cache, or None; taken as 16-bit weights."""
    if params.base.scratch is not None:
        vocabulary = getattr(params.tokenizer, "vocab_size", 0)
        return Size(scratch_parameters(params.base.scratch, vocabulary), "base.scratch")
    base = params.fetch.base_model
    name = base.repo_id if isinstance(base, HubBase) else ""
    if name in KNOWN_PARAMETERS:
        return Size(KNOWN_PARAMETERS[name], "its page on the Hub")
    if cached_bytes is not None:
        return Size(cached_bytes // HUB_BYTES_PER_PARAMETER, "its files in the Hub cache, taken as 16 bit")
    found = re.search(r"(?i)(?<![\w.])(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", name.replace("-", " ").replace("_", " "))
    if found is None:
        return Size(None, "neither its files nor its name say it")
    return Size(int(float(found[1]) * {"b": 1e9, "m": 1e6}[found[2].lower()]), "its name, estimated")


def run_needs(
    params: Params,
    size: Size,
    *,
    missing_base_bytes: int | None,
    trained_bytes: int | None,
    optimizer_bytes: int | None,
    copies: int,
    uploads: bool,
) -> list[Need]:
    """What the stages from `base` to `register` write.

    `trained_bytes`, `optimizer_bytes`: of the trained weights and their optimizer in memory, which is what a checkpoint
    holds. `copies`: how often the disk holds an out, 2 where DVC cannot link. `uploads`: into a local MLflow folder.
    """
    train, count = params.train_qlora, size.parameters
    checkpoint = None if trained_bytes is None or optimizer_bytes is None else trained_bytes + optimizer_bytes
    merged_once = _times(count, BYTES[params.merge.dtype])
    types = [entry.type for entry in params.quantize_gguf.types]
    files = _times(count, sum(GGUF_BITS[name] for name in types) / 8)
    needs = [
        Need("base model to download", missing_base_bytes, "HF_HOME"),
        # One more than are kept is there while the newest is written.
        Need(f"{train.keep_checkpoints + 1} checkpoints", _times(checkpoint, train.keep_checkpoints + 1), "repository"),
        Need("adapter" if train.lora else "trained model", _times(trained_bytes, copies), "repository"),
        Need("merged model", _times(merged_once, copies), "repository"),
        Need("whole GGUF, for the time of quantisation", merged_once, "repository"),
        Need(f"GGUF files ({', '.join(types)})", _times(files, copies), "repository"),
        Need("temporary files", TEMPORARY_BYTES, "TMPDIR"),
    ]
    if params.base.scratch is not None:
        needs[0] = Need("base model", _times(count, 2 * copies), "repository")
    if uploads and params.registration.mode == "upload":
        needs.append(Need("upload into mlartifacts", merged_once, "repository"))
    return needs


def disk_results(needs: Sequence[Need], disks: Mapping[str, Disk]) -> list[Result]:
    """One result for each disk, with the needs of all places on it."""
    results = []
    for number in dict.fromkeys(disk.number for disk in disks.values()):
        places = [place for place, disk in disks.items() if disk.number == number]
        here = [need for need in needs if need.place in places]
        free_bytes = disks[places[0]].free_bytes
        results.append(_disk_result(f"disk of {', '.join(places)}", here, free_bytes))
    return results


def stored_times(config: str) -> int:
    """How often the disk holds an out: once where `[cache] type` allows hard links or symbolic ones, else twice."""
    parser = configparser.ConfigParser()
    parser.read_string(config)
    types = parser.get("cache", "type", fallback="reflink,copy").strip("'\"").replace(" ", "").split(",")
    return 1 if {"hardlink", "symlink"} & set(types) else 2


def read_disk(folder: Path) -> Disk:
    """The disk of a folder, or of the nearest one above it that exists."""
    import shutil

    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return Disk(there.stat().st_dev, shutil.disk_usage(there).free)


def _disk_result(check: str, needs: Sequence[Need], free_bytes: int) -> Result:
    total = sum(need.size_bytes or 0 for need in needs)
    unknown = [need.what for need in needs if need.size_bytes is None]
    lines = [f"{gib(free_bytes)} free, a whole run writes {'at least ' if unknown else ''}{gib(total)}"]
    lines += [
        f"{gib(need.size_bytes)}  {need.what}" for need in needs if need.size_bytes and need.size_bytes >= 1 << 26
    ]
    lines += [f"not known: {', '.join(unknown)}"] if unknown else []
    found = "\n".join(lines)
    if total > free_bytes:
        remedy = (
            f"free {gib(total - free_bytes)} there, ask for fewer quantize_gguf.types, or move it (HF_HOME, TMPDIR)"
        )
        return fault(check, found, remedy)
    if total * MARGIN > free_bytes:
        return warning(check, found, f"free {gib(total * MARGIN - free_bytes)} more there")
    return ok(check, found)


def _times(value: int | None, factor: float) -> int | None:
    return None if value is None else int(value * factor)
