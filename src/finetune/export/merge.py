"""base shards + adapter -> merged shards: W + scale * B A in float32, rounded once, one shard in memory at a time.

DoRA follows Liu et al. 2024 (arXiv 2402.09353): the merged row is rescaled to the learned magnitude. Rows of an
extended vocabulary, which the adapter holds whole, are written into the embedding tables by token id.

What a file does not say is read from the architecture: which layers hold their weight as [in, out] (Conv1D, as in
GPT-2; a square one looks the same both ways), and the name that a file's tensor has in the model.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from finetune.errors import ExportError
from finetune.io import read_json, write_json
from finetune.log import progress

INDEX = "model.safetensors.index.json"
PREFIX = "base_model.model."
ROWS_SUFFIX = ".token_adapter.trainable_tokens_delta"
OUTPUT_TABLE = "lm_head.weight"
# Causal masks that transformers once saved beside the weights, as in openai-community/gpt2: no model loads them, and
# llama.cpp's converter for GPT-2 fails on them.
MASKS = (".attn.bias", ".attn.masked_bias")
# Head room for the tokenizer, the index and the file system's own rounding.
DISK_MARGIN = 1.05


@dataclass(frozen=True)
class Layout:
    """An architecture's tensor `names`, those of [in, out] weights, and the `prefix` that files may leave out."""

    names: frozenset[str]
    transposed: frozenset[str]
    prefix: str

    def name_of(self, stored: str) -> str:
        """The name in the model of a tensor that a file calls `stored`."""
        prefixed = f"{self.prefix}.{stored}"
        return prefixed if stored not in self.names and prefixed in self.names else stored

    def is_mask(self, stored: str) -> bool:
        """Whether a file's tensor is a causal mask that the model makes itself."""
        return stored.endswith(MASKS) and self.name_of(stored) not in self.names


def read_layout(base: Path) -> Layout:
    """The architecture that a base's config.json names, built without weights."""
    config = AutoConfig.from_pretrained(base, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    conv1d = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    return Layout(frozenset(model.state_dict()), frozenset(conv1d), model.base_model_prefix)


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one weight [out, in]: A [rank, in], B [out, rank], and DoRA's magnitude [out].

    `transposed`: the base holds the weight as [in, out].
    """

    a: torch.Tensor
    b: torch.Tensor
    magnitude: torch.Tensor | None
    scale: float
    transposed: bool

    def apply(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The merged weight, computed in float32 and rounded to `dtype`."""
        held = weight.T.contiguous() if self.transposed else weight
        shape = (self.b.shape[0], self.a.shape[1])
        if held.shape != shape:
            raise ValueError(f"is {tuple(held.shape)} in the base and {shape} in the adapter")
        merged = held.float() + self.scale * (self.b.float() @ self.a.float())
        if self.magnitude is not None:
            merged = merged * (self.magnitude.float() / merged.norm(dim=1))[:, None]
        return (merged.T if self.transposed else merged).to(dtype)


@dataclass(frozen=True)
class Rows:
    """What an adapter puts in place of rows of an embedding table: ascending token ids, and values [ids, width]."""

    ids: tuple[int, ...]
    values: torch.Tensor

    def apply(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The table in `dtype` with these rows, grown as far as their ids go; every other row keeps its values."""
        held, width = weight.shape
        rows = max(held, self.ids[-1] + 1)
        if width != self.values.shape[1]:
            raise ValueError(f"is {width} wide in the base and {self.values.shape[1]} in the adapter")
        if unfilled := sorted(set(range(held, rows)) - set(self.ids)):
            raise ValueError(f"has {held} rows in the base, and the adapter leaves row {unfilled[0]} empty")
        merged = torch.empty(rows, width, dtype=dtype)
        merged[:held] = weight.to(dtype)
        merged[list(self.ids)] = self.values.to(dtype)
        return merged


def read_updates(adapter: Path, trained_ids: Sequence[int], transposed: frozenset[str]) -> dict[str, Update | Rows]:
    """The adapter's updates by the name of the base weight; `trained_ids`: the vocabulary's rows that it must hold.

    `transposed`: the weights that the base holds as [in, out]. Raises ExportError for a tensor that cannot be merged,
    and for rows that are missing or are other tokens'.
    """
    config = read_json(adapter / "adapter_config.json")
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    modules = sorted({name.rsplit(".lora_", 1)[0] for name in tensors if ".lora_" in name})
    updates: dict[str, Update | Rows] = {}
    used = set()
    for module in modules:
        names = [f"{module}.lora_{part}" for part in ("A.weight", "B.weight", "magnitude_vector")]
        used |= {name for name in names if name in tensors}
        a, b = tensors[names[0]], tensors[names[1]]
        weight = f"{module.removeprefix(PREFIX)}.weight"
        updates[weight] = Update(a, b, tensors.get(names[2]), scale, weight in transposed)
    for module, ids in sorted((config["trainable_token_indices"] or {}).items()):
        name = f"{PREFIX}{module}{ROWS_SUFFIX}"
        if name not in tensors or len(tensors[name]) != len(ids):
            raise ExportError(
                f"the adapter names rows of {module} and holds {'others' if name in tensors else 'none'}",
                adapter / "adapter_model.safetensors",
                "dvc repro --force --single-item train_qlora",
            )
        used.add(name)
        updates[f"{module}.weight"] = Rows(tuple(ids), tensors[name])
    _check_vocabulary(updates, trained_ids, adapter)
    if left := sorted(set(tensors) - used):
        raise ExportError(
            f"the adapter holds tensors that a merge does not know: {', '.join(left[:3])}",
            adapter / "adapter_model.safetensors",
            "train with LoRA, DoRA or rsLoRA on linear layers only",
        )
    return updates


def _check_vocabulary(updates: dict[str, Update | Rows], trained_ids: Sequence[int], adapter: Path) -> None:
    held = [update.ids for update in updates.values() if isinstance(update, Rows)]
    if any(ids != tuple(trained_ids) for ids in held) or bool(held) != bool(trained_ids):
        raise ExportError(
            f"the tokenizer has {len(trained_ids)} new tokens, and the adapter holds rows of "
            f"{len(held[0]) if held else 0}, or of other ones",
            adapter / "adapter_model.safetensors",
            "train with this tokenizer: dvc repro train_qlora",
        )


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


def merge_shards(base: Path, adapter: Path, target: Path, dtype: str, trained_ids: Sequence[int]) -> dict[str, int]:
    """Write the merged model's shards and configuration below `target`; returns counts of tensors and of rows.

    `trained_ids`: tokens of an extended vocabulary, whose rows the adapter must hold; empty for the base's own.
    Raises ExportError when an update finds no weight, is not finite, or changes nothing, and when rows are missing.
    """
    layout = read_layout(base)
    updates = read_updates(adapter, trained_ids, layout.transposed)
    shards = shards_of(base)
    pending, vocab_size = dict(updates), None
    written: set[str] = set()
    tables = [update for update in updates.values() if isinstance(update, Rows)]
    # Some makers store the output table of a tied model beside the input table.
    copies = {OUTPUT_TABLE: tables[0]} if len(tables) == 1 else {}
    for shard in progress(shards, len(shards), "shard", "merge"):
        merged = {}
        for stored, weight in sorted(load_file(shard).items()):
            if layout.is_mask(stored):
                continue
            name = layout.name_of(stored)
            update = pending.pop(name, copies.get(name))
            merged[stored] = _merged_weight(name, weight, update, getattr(torch, dtype))
            vocab_size = len(merged[stored]) if isinstance(update, Rows) else vocab_size
        written |= merged.keys()
        save_file(merged, target / shard.name, metadata={"format": "pt"})
    if pending:
        raise ExportError(
            f"{len(pending)} adapter weights have no counterpart in the base, such as {min(pending)}",
            base,
            "merge onto the base that the adapter was trained on: dvc repro --force --single-item base",
        )
    _copy_configuration(base, target, dtype, vocab_size, written)
    return {"tensors": len(written), "changed_tensors": len(updates), "new_tokens": len(trained_ids)}


def _merged_weight(name: str, weight: torch.Tensor, update: Update | Rows | None, dtype: torch.dtype) -> torch.Tensor:
    if update is None:
        return weight.to(dtype).contiguous()
    try:
        merged = update.apply(weight, dtype)
    except ValueError as fault:
        raise ExportError(f"{name} {fault}", name, "merge onto the base that the adapter was trained on") from None
    if not bool(torch.isfinite(merged).all()):
        raise ExportError(f"{name} has infinite or undefined values after the merge", name, "use merge.dtype: bfloat16")
    if torch.equal(merged, weight.to(dtype)):
        raise ExportError(
            f"the adapter changes no value of {name}",
            name,
            "train for more steps or with a higher train_qlora.learning_rate: this adapter learned nothing there",
        )
    return merged.contiguous()


def _copy_configuration(base: Path, target: Path, dtype: str, vocab_size: int | None, tensors: Set[str]) -> None:
    config = read_json(base / "config.json")
    config.pop("quantization_config", None)
    config.pop("torch_dtype", None)
    # It names code of a repository, which nothing here runs.
    config.pop("auto_map", None)
    if vocab_size is not None:
        config["vocab_size"] = vocab_size
    write_json(target / "config.json", {**config, "dtype": dtype})
    for name in ("generation_config.json", "tokenizer.model"):
        if (base / name).is_file():
            shutil.copyfile(base / name, target / name)
    if (base / INDEX).is_file():
        # Without its total size, which is the base's own and changes with the dtype.
        weight_map = read_json(base / INDEX)["weight_map"]
        kept = {name: shard for name, shard in weight_map.items() if name in tensors}
        write_json(target / INDEX, {"metadata": {}, "weight_map": kept})


def check_reload(loading_info: dict[str, Any], target: Path) -> None:
    """Raise ExportError when loading the merged model left a weight missing, unexpected or of another shape."""
    faults = {kind: sorted(map(str, names)) for kind, names in loading_info.items() if names}
    if faults:
        raise ExportError(f"the merged model does not load strictly: {faults}", target, "report this with params.yaml")
