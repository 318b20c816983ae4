"""train_qlora.method -> what is trained, saved and loaded again: an adapter on a frozen base, or every weight of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from finetune.errors import DataError
from finetune.io import read_json, write_json
from finetune.training.device import dtype_named
from finetune.training.full import load_full, load_full_beside_base, prepare_full, save_full
from finetune.training.model import add_adapter, attach_adapter, keep_adapter_float32, load_extended, save_adapter
from finetune.training.trained_on import RETRAIN, TRAINED_ON_FILE
from finetune.training.vocabulary import Extension, remember_start, table_names
from finetune.training_sections import Quantization, TrainQlora

LORA, FULL = "lora", "full"


def loading_dtype(settings: TrainQlora) -> torch.dtype:
    """In which dtype the base is loaded to be trained: frozen weights in `compute_dtype`, trained ones in float32."""
    return torch.float32 if settings.method == FULL else dtype_named(settings.compute_dtype)


def make_trainable(model: Any, settings: TrainQlora, extension: Extension) -> Any:
    """The model that is trained: `model` with a fresh adapter, or itself with every weight trainable; in float32.

    `model` comes from `load_extended` in `loading_dtype`. Raises DataError and DeviceError as `add_adapter` does.
    """
    if settings.lora is None:
        remember_start(model, extension, table_names(model))
        return prepare_full(model)
    adapted = add_adapter(model, settings.lora, extension)
    keep_adapter_float32(adapted)
    return adapted


def save_trained(model: Any, trained_on: dict[str, Any], target: Path) -> None:
    """Write what was trained, and beside it what `describe` said of its base, with the method."""
    method = LORA if isinstance(model, PeftModel) else FULL
    save_adapter(model, target) if method == LORA else save_full(model, target)
    write_json(target / TRAINED_ON_FILE, {"method": method, **trained_on})


def load_trained(
    base: Path,
    trained: Path,
    extension: Extension,
    four_bit: dict[str, Any] | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """The tuned model for inference, the frozen base in 4 bit as trained_on.json says; None: as it is, in `dtype`."""
    method, model = _method_of(trained), _load_base_of(base, extension, four_bit, dtype, device)
    return attach_adapter(model, trained) if method == LORA else load_full(model, trained)


def load_beside_base(
    base: Path,
    trained: Path,
    extension: Extension,
    four_bit: dict[str, Any] | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """As `load_trained`; within the model's `disable_adapter()` it is the base, with either method."""
    method, model = _method_of(trained), _load_base_of(base, extension, four_bit, dtype, device)
    return attach_adapter(model, trained) if method == LORA else load_full_beside_base(model, trained)


def _method_of(trained: Path) -> str:
    method = read_json(trained / TRAINED_ON_FILE).get("method")
    if method not in (LORA, FULL):
        raise DataError(f"the training's method is {method}, none of these", trained / TRAINED_ON_FILE, RETRAIN)
    return str(method)


def _load_base_of(
    base: Path, extension: Extension, four_bit: dict[str, Any] | None, dtype: torch.dtype, device: torch.device
) -> Any:
    quantization = None
    if four_bit is not None:
        quantization = Quantization(format=four_bit["kind"], double_quantization=four_bit["double_quantization"])
    return load_extended(base, extension, quantization, dtype, device)
