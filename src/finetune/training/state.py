"""model, optimizer, schedule, generators <-> tensors and JSON: all that the rest of a run depends on.

No pickle: tensors go into safetensors, everything else into JSON. Weights are those that train, in their own dtype.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from finetune.errors import DataError
from finetune.training.sharding import as_shard, load_whole_state, whole

Tensors = dict[str, torch.Tensor]


def capture(model: Any, optimizer: Any, scheduler: Any, scaler: Any) -> tuple[Tensors, dict[str, Any]]:
    """The trained weights and the optimizer's tensors, on the CPU, and the rest as JSON values."""
    tensors = {f"weights.{name}": on_cpu(weight) for name, weight in trained_weights(model).items()}
    content = {
        "optimizer": packed(optimizer.state_dict(), "optimizer", tensors),
        "scheduler": packed(scheduler.state_dict(), "scheduler", tensors),
        "scaler": packed(scaler.state_dict(), "scaler", tensors) if scaler is not None else None,
    }
    return tensors, content


def restore(
    model: Any, optimizer: Any, scheduler: Any, scaler: Any, tensors: Mapping[str, torch.Tensor], content: Any
) -> None:
    """Put what `capture` returned back, in place; raises DataError when the weights have other names or shapes."""
    restore_weights(model, tensors)
    load_whole_state(optimizer, unpacked(content["optimizer"], tensors))
    scheduler.load_state_dict(unpacked(content["scheduler"], tensors))
    if scaler is not None:
        scaler.load_state_dict(unpacked(content["scaler"], tensors))


def restore_weights(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put the tensors named `weights.*` back into the trained weights of `model`."""
    weights = trained_weights(model)
    saved = {name.removeprefix("weights."): value for name, value in tensors.items() if name.startswith("weights.")}
    if differing := sorted(weights.keys() ^ saved.keys()):
        raise DataError(
            f"the checkpoint holds other weights than the model trains: {', '.join(differing[:3])}",
            ".cache/checkpoints",
            "delete the folder and run `dvc repro`",
        )
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(as_shard(saved[name], weight))


def trained_weights(model: Any) -> dict[str, torch.Tensor]:
    """Name -> weight, of all weights that train."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def packed(value: Any, path: str, tensors: Tensors) -> Any:
    """`value` as JSON: tensors move into `tensors` under their path, and keys keep their type."""
    if isinstance(value, torch.Tensor):
        tensors[path] = on_cpu(value)
        return {"tensor": path}
    if isinstance(value, Mapping):
        return {"items": [[key, packed(entry, f"{path}.{key}", tensors)] for key, entry in value.items()]}
    if isinstance(value, list | tuple):
        return [packed(entry, f"{path}.{number}", tensors) for number, entry in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path} is a {type(value).__name__}, which a checkpoint cannot hold")


def unpacked(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """What `packed` made JSON of; tuples come back as lists."""
    if isinstance(value, Mapping):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: unpacked(entry, tensors) for key, entry in value["items"]}
    if isinstance(value, list):
        return [unpacked(entry, tensors) for entry in value]
    return value


def capture_generators(device: torch.device) -> dict[str, Any]:
    """The states of all random generators of this process, as JSON; CUDA's of `device` only."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), *rest],  # type: ignore[union-attr]
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": torch.cuda.get_rng_state(device).numpy().tobytes().hex() if device.type == "cuda" else None,
    }


def restore_generators(states: Mapping[str, Any], device: torch.device) -> None:
    """Put the states of `capture_generators` back."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_from_hex(states["torch"]))
    if device.type == "cuda":
        torch.cuda.set_rng_state(_from_hex(states["cuda"]), device)


def _from_hex(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def on_cpu(value: torch.Tensor) -> torch.Tensor:
    """The whole tensor on the CPU, put together where processes hold shards: all of them must call it."""
    return whole(value.detach()).cpu().contiguous()
