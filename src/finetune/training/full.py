"""every weight of a base, trained -> safetensors files in float32 (models/adapter), and back onto a base of its shape.

The master weights are float32, whatever `compute_dtype` is: an update is often smaller than what bfloat16 can tell from
zero beside its weight (Micikevicius et al. 2018, arXiv 1710.03740, section 3.1), and what is saved is what was trained.
Autocast rounds a copy for each product. That is 4 bytes a parameter, as many for its gradient, and 8 for AdamW's two
moments (2 with an 8-bit optimizer).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from finetune.errors import DataError
from finetune.io import read_json, replacing, write_json

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
# A shard is copied into memory before it is written.
SHARD_BYTES = 4_000_000_000
RETRAIN = "dvc repro --force --single-item train_qlora"


def prepare_full(model: Any) -> Any:
    """Make every weight of `model` trainable, in float32, in place; returns the model."""
    return model.float().requires_grad_(True)


def save_full(model: Any, target: Path) -> None:
    """Write every parameter once, by its name in the model: in one file, or in shards of SHARD_BYTES with an index."""
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    shards = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD_BYTES)
    for file, names in shards.filename_to_tensors.items():
        with replacing(target / file) as temporary:
            save_file({name: tensors[name].cpu().contiguous() for name in names}, temporary, {"format": "pt"})
    if shards.is_sharded:
        write_json(target / INDEX, {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename})


def load_full(model: Any, trained: Path) -> Any:
    """Put the weights of a folder in place of those of `model`, in its own dtype, one at a time; returns the model.

    Raises DataError for a file that is damaged, and for weights that are missing, unexpected or of another shape.
    """
    _read_into(dict(model.named_parameters()), trained)
    return model.eval()


def load_full_beside_base(model: Any, trained: Path) -> Any:
    """As `load_full`, but the base's weights stay: within `model.disable_adapter()`, as PEFT names it, they count.

    Both are held on the model's device: twice its size, where training took four times it and more.
    """
    base = {name: parameter.data for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data = torch.empty_like(parameter.data)
    load_full(model, trained)
    model.disable_adapter = partial(_holding, model, base)
    return model


@contextmanager
def _holding(model: Any, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Let the parameters of `model` be `values` for a while; nothing is copied."""
    own = {name: parameter.data for name, parameter in model.named_parameters()}
    _set_data(model, values)
    try:
        yield
    finally:
        _set_data(model, own)


def _set_data(model: Any, values: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.data = values[name]


@torch.no_grad()
def _read_into(parameters: dict[str, torch.nn.Parameter], trained: Path) -> None:
    left = dict(parameters)
    for file in _files(trained):
        try:
            with safe_open(file, "pt") as tensors:
                for name in sorted(tensors.keys()):
                    values, parameter = tensors.get_tensor(name), left.pop(name, None)
                    if parameter is None or parameter.shape != values.shape:
                        held = "none" if parameter is None else tuple(parameter.shape)
                        _refuse(f"{name} is {tuple(values.shape)} in training and {held} here", file)
                    else:
                        parameter.copy_(values)
        except (SafetensorError, FileNotFoundError) as fault:
            raise DataError(f"the trained weights cannot be read: {fault}", file, RETRAIN) from fault
    if left:
        _refuse(f"{len(left)} of {len(parameters)} weights are missing, such as {min(left)}", trained)


def _files(trained: Path) -> list[Path]:
    if (trained / INDEX).is_file():
        return [trained / name for name in sorted(set(read_json(trained / INDEX)["weight_map"].values()))]
    return [trained / ONE_FILE]


def _refuse(what: str, where: Path) -> None:
    raise DataError(f"the trained weights do not fit this base: {what}", where, RETRAIN)
