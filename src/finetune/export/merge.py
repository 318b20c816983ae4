"""base shards + adapter -> merged shards: W + scale * B A in float32, rounded once, one shard in memory at a time.

DoRA follows Liu et al. 2024 (arXiv 2402.09353): the merged row is rescaled to the learned magnitude.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune.errors import ExportError
from finetune.io import read_json, write_json
from finetune.log import progress

INDEX = "model.safetensors.index.json"
PREFIX = "base_model.model."
# Head room for the tokenizer, the index and the file system's own rounding.
DISK_MARGIN = 1.05


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one weight [out, in]: A [rank, in], B [out, rank], and DoRA's magnitude [out]."""

    a: torch.Tensor
    b: torch.Tensor
    magnitude: torch.Tensor | None
    scale: float

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """The merged weight in float32."""
        merged = weight.float() + self.scale * (self.b.float() @ self.a.float())
        if self.magnitude is not None:
            merged = merged * (self.magnitude.float() / merged.norm(dim=1))[:, None]
        return merged


def read_updates(adapter: Path) -> dict[str, Update]:
    """The adapter's updates by the name of the base weight; raises ExportError for a tensor that cannot be merged."""
    config = read_json(adapter / "adapter_config.json")
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    modules = sorted({name.rsplit(".lora_", 1)[0] for name in tensors if ".lora_" in name})
    updates, used = {}, set()
    for module in modules:
        names = [f"{module}.lora_{part}" for part in ("A.weight", "B.weight", "magnitude_vector")]
        used |= {name for name in names if name in tensors}
        a, b = tensors[names[0]], tensors[names[1]]
        updates[f"{module.removeprefix(PREFIX)}.weight"] = Update(a, b, tensors.get(names[2]), scale)
    if left := sorted(set(tensors) - used):
        raise ExportError(
            f"the adapter holds tensors that a merge does not know: {', '.join(left[:3])}",
            adapter / "adapter_model.safetensors",
            "train with LoRA, DoRA or rsLoRA on linear layers only",
        )
    return updates


def shards_of(model: Path) -> list[Path]:
    """The weight files that a model's index names, else its one file: other files may lie beside them."""
    if (model / INDEX).is_file():
        return [model / name for name in sorted(set(read_json(model / INDEX)["weight_map"].values()))]
    if (model / "model.safetensors").is_file():
        return [model / "model.safetensors"]
    raise ExportError("no model.safetensors, nor an index of shards", model, "dvc repro --force --single-item fetch")


def count_parameters(model: Path) -> int:
    """How many values a model's weight files hold; reads their headers only."""
    total = 0
    for shard in shards_of(model):
        with safe_open(shard, framework="pt") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total


def check_memory(base: Path, dtype: str) -> None:
    """Refuse, before anything is written, a comparison that would not fit into this machine's free memory."""
    needed_bytes = count_parameters(base) * getattr(torch, dtype).itemsize
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    free_bytes = int(fields["MemAvailable"].split()[0]) * 1024
    if free_bytes < needed_bytes:
        raise ExportError(
            f"the comparison in {dtype} needs {needed_bytes:,} bytes of memory, and {free_bytes:,} are free",
            "merge.compare_dtype",
            "set merge.compare_dtype: bfloat16, or use a machine with more memory",
        )


def check_disk(base: Path, target: Path, dtype: str) -> None:
    """Refuse, before anything is written, a target whose disk cannot hold the merged model."""
    needed_bytes = int(count_parameters(base) * getattr(torch, dtype).itemsize * DISK_MARGIN)
    free_bytes = shutil.disk_usage(target.parent).free
    if free_bytes < needed_bytes:
        raise ExportError(
            f"the merged model needs {needed_bytes:,} bytes, and {free_bytes:,} are free",
            target.parent,
            f"free at least {needed_bytes - free_bytes:,} bytes there, then `dvc repro`",
        )


def merge_shards(base: Path, adapter: Path, target: Path, dtype: str) -> dict[str, int]:
    """Write the merged model's shards and configuration below `target`; returns counts of tensors.

    Raises ExportError when an update finds no weight, is not finite, or changes nothing.
    """
    updates = read_updates(adapter)
    shards = shards_of(base)
    pending, total = dict(updates), 0
    for shard in progress(shards, len(shards), "shard", "merge"):
        merged = {}
        for name, weight in sorted(load_file(shard).items()):
            update = pending.pop(name, None)
            merged[name] = _merged_weight(name, weight, update, getattr(torch, dtype))
        total += len(merged)
        save_file(merged, target / shard.name, metadata={"format": "pt"})
    if pending:
        raise ExportError(
            f"{len(pending)} adapter weights have no counterpart in the base, such as {min(pending)}",
            base,
            "merge onto the base that the adapter was trained on: dvc repro --force --single-item base",
        )
    _copy_configuration(base, target, dtype)
    return {"tensors": total, "changed_tensors": len(updates)}


def _merged_weight(name: str, weight: torch.Tensor, update: Update | None, dtype: torch.dtype) -> torch.Tensor:
    if update is None:
        return weight.to(dtype).contiguous()
    if weight.shape != (update.b.shape[0], update.a.shape[1]):
        raise ExportError(
            f"{name} is {tuple(weight.shape)} in the base and {(update.b.shape[0], update.a.shape[1])} in the adapter",
            name,
            "merge onto the base that the adapter was trained on",
        )
    merged = update.apply(weight).to(dtype)
    if not bool(torch.isfinite(merged).all()):
        raise ExportError(f"{name} has infinite or undefined values after the merge", name, "use merge.dtype: bfloat16")
    if torch.equal(merged, weight.to(dtype)):
        raise ExportError(
            f"the adapter changes no value of {name}",
            name,
            "train for more steps or with a higher train_qlora.learning_rate: this adapter learned nothing there",
        )
    return merged.contiguous()


def _copy_configuration(base: Path, target: Path, dtype: str) -> None:
    config = read_json(base / "config.json")
    config.pop("quantization_config", None)
    config.pop("torch_dtype", None)
    # It names code of a repository, which nothing here runs.
    config.pop("auto_map", None)
    write_json(target / "config.json", {**config, "dtype": dtype})
    for name in ("generation_config.json", "tokenizer.model"):
        if (base / name).is_file():
            shutil.copyfile(base / name, target / name)
    if (base / INDEX).is_file():
        # Without its total size, which is the base's own and changes with the dtype.
        write_json(target / INDEX, {"metadata": {}, "weight_map": read_json(base / INDEX)["weight_map"]})


def check_reload(loading_info: dict[str, Any], target: Path) -> None:
    """Raise ExportError when loading the merged model left a weight missing, unexpected or of another shape."""
    faults = {kind: sorted(map(str, names)) for kind, names in loading_info.items() if names}
    if faults:
        raise ExportError(f"the merged model does not load strictly: {faults}", target, "report this with params.yaml")
