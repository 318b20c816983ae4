"""train_qlora.liger_kernels -> what the trainer is told: fused norms, rotations and activations, or a refusal.

Liger Kernel (https://github.com/linkedin/Liger-Kernel, BSD 2-clause) computes each of them in one pass and keeps less
for the backward. Its fused output layer stays off, since trl has one of its own; nothing is fetched from the Hub.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from finetune.errors import DeviceError
from finetune.training_sections import TrainQlora

KEY = "train_qlora.liger_kernels"
# It needs triton, which only torch's CUDA builds bring along, and so it is in no requirements file.
INSTALL = "pip install liger-kernel==0.8.5"
KERNELS = {
    "rope": True,
    "rms_norm": True,
    "layer_norm": True,
    "swiglu": True,
    "geglu": True,
    "cross_entropy": False,
    "fused_linear_cross_entropy": False,
}


def liger_arguments(settings: TrainQlora, model_type: str, device: torch.device) -> dict[str, Any]:
    """Arguments for SFTConfig; none where `liger_kernels` is false. `model_type` is that of the base's configuration.

    Raises DeviceError without a CUDA device, without the package, and for a model that it has no kernels for: it would
    only say so in its log.
    """
    if not settings.liger_kernels:
        return {}
    if device.type != "cuda":
        raise DeviceError("Liger's kernels need a CUDA device", KEY, f"set {KEY}: false")
    if find_spec("liger_kernel") is None:
        raise DeviceError("liger-kernel is not installed", KEY, f"{INSTALL}, or set {KEY}: false")
    known = import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    if model_type not in known:
        raise DeviceError(f"Liger has no kernels for {model_type}", KEY, f"set {KEY}: false")
    return {"use_liger_kernel": True, "liger_kernel_config": dict(KERNELS)}
