"""models/base and the model in training -> what trained_on.json says beside an adapter: the weights it was trained on.

An adapter fits no other weights. Merged onto another checkpoint it gives nonsense, or the base again, without an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit

from finetune.errors import DataError
from finetune.io import read_json, sha256_file
from finetune.training.model import BASE_FILE

TRAINED_ON_FILE = "trained_on.json"
RETRAIN = "dvc repro --force --single-item train_qlora"


def describe(base: Path, model: Any) -> dict[str, Any]:
    """What trained_on.json holds: `base`, and `four_bit`, the settings of its 4-bit layers with their names, or null.

    `model` is the base as it is trained on, before it gets an adapter: bitsandbytes leaves some layers as they are, and
    which ones is asked of the layers themselves.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    settings = [
        {
            "kind": layer.weight.quant_type,
            "double_quantization": layer.weight.compress_statistics,
            "blocksize": layer.weight.blocksize,
            "storage": _name(layer.weight.quant_storage),
            "dtype": _name(layer.weight.quant_state.dtype),
        }
        for layer in layers.values()
    ]
    # transformers gives all layers the same ones.
    four_bit = {"layers": sorted(layers), **settings[0]} if layers else None
    return {"base": describe_base(base), "four_bit": four_bit}


def describe_base(base: Path) -> dict[str, Any]:
    """The base's repository and revision, and the SHA-256 of its configuration and weight files by name.

    A Hub base's are those of its manifest, which the base stage has verified; a scratch base has none, and is read.
    """
    manifest = read_json(base / BASE_FILE)
    if manifest["kind"] == "scratch":
        files = {file.name: sha256_file(file) for file in base.iterdir() if _is_weights(file.name)}
    else:
        files = {file["path"]: file["sha256"] for file in manifest["files"] if _is_weights(file["path"])}
    return {"repo_id": manifest.get("repo_id"), "revision": manifest.get("revision"), "files": files}


def read_trained_on(adapter: Path, base: Path) -> dict[str, Any] | None:
    """What an adapter says of its base's 4-bit layers, null for none; raises DataError when it has another base."""
    path = adapter / TRAINED_ON_FILE
    if not path.is_file():
        raise DataError("the adapter does not say which base it was trained on", path, RETRAIN)
    content = read_json(path)
    trained, found = content["base"], describe_base(base)
    differing = [
        f"{key} ({trained[key]}, here {found[key]})" for key in ("repo_id", "revision") if trained[key] != found[key]
    ]
    names = sorted(trained["files"].keys() | found["files"].keys())
    differing += [name for name in names if trained["files"].get(name) != found["files"].get(name)]
    if differing:
        raise DataError(
            f"the adapter was trained on another base than this one; they differ in: {', '.join(differing[:3])}",
            path,
            f"train on this base: {RETRAIN}; or set fetch.base_model to the one that it was trained on",
        )
    four_bit: dict[str, Any] | None = content["four_bit"]
    return four_bit


def to_device_with_room(model: Any, device: torch.device) -> Any:
    """The model on a CUDA device whose free memory holds it and half as much again for its work, else where it is."""
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > 1.5 * model.get_memory_footprint():
        return model.to(device)
    return model


def _is_weights(name: str) -> bool:
    return name == "config.json" or name.endswith(".safetensors")


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
