"""compute dtype + machine -> the device, decided once; hardware that cannot do what is asked is an error."""

from __future__ import annotations

import os
import random

import numpy as np
import torch

from finetune.errors import DeviceError
from finetune.log import logger
from finetune.training_sections import CudaMemory, TrainQlora

GIB = 1 << 30


def dtype_named(name: str) -> torch.dtype:
    """The torch dtype that params.yaml names."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def choose_device() -> torch.device:
    """This process' CUDA device (the first, unless a launcher says LOCAL_RANK), else the CPU; logged in one line."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        properties = torch.cuda.get_device_properties(device)
        logger.info("device: %s, %.1f GiB", properties.name, properties.total_memory / GIB)
        return device
    logger.info("device: CPU, %d thread(s)", torch.get_num_threads())
    return torch.device("cpu")


def make_deterministic(seed: int, cpu_threads: int) -> None:
    """Seed every generator, fix the thread count and refuse kernels whose result depends on timing.

    `CUBLAS_WORKSPACE_CONFIG` is set in finetune.runtime; `CUDA_LAUNCH_BLOCKING` is not needed and not set
    (https://docs.pytorch.org/docs/stable/notes/randomness.html).
    """
    torch.set_num_threads(cpu_threads)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    # Filling every fresh tensor with NaN finds reads of unwritten memory; it also takes 14 % of a smoke step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def allow_any_kernel() -> None:
    """Let torch take kernels whose result depends on timing again: faster on a GPU, and no two runs are equal there."""
    torch.use_deterministic_algorithms(False)
    logger.info("train_qlora.deterministic is false: on a GPU no two runs give the same bytes")


def limit_cuda_memory(memory: CudaMemory, device: torch.device) -> None:
    """Set how torch's allocator takes memory, before it has taken any; nothing on a CPU.

    https://docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-pytorch-alloc-conf
    """
    if device.type != "cuda":
        return
    options = [f"expandable_segments:{memory.expandable_segments}"]
    if memory.max_split_size_mib is not None:
        options.append(f"max_split_size_mb:{memory.max_split_size_mib}")
    os.environ["PYTORCH_ALLOC_CONF"] = ",".join(options)
    torch.cuda.set_per_process_memory_fraction(memory.fraction, device)


def check_hardware(settings: TrainQlora, device: torch.device) -> None:
    """Raise DeviceError for settings that this device cannot honour exactly."""
    if device.type == "cpu":
        if settings.compute_dtype != "float32":
            raise DeviceError(
                f"compute_dtype is {settings.compute_dtype}, and on a CPU only float32 gives the same bytes everywhere",
                "train_qlora.compute_dtype",
                "set train_qlora.compute_dtype: float32, or run on a machine where `nvidia-smi` shows a GPU",
            )
        if settings.optimizer != "adamw_torch_fused":
            # adamw_torch takes square roots from MKL's vector library, which starts from the processor's own
            # approximation: 17 % of them are off by one bit, and other ones on other processors.
            raise DeviceError(
                f"optimizer {settings.optimizer} gives other bytes on other CPUs, or needs a CUDA device",
                "train_qlora.optimizer",
                "set train_qlora.optimizer: adamw_torch_fused, or run on a machine where `nvidia-smi` shows a GPU",
            )
    elif settings.compute_dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise DeviceError(
            f"{torch.cuda.get_device_name(device)} has no bfloat16 arithmetic",
            "train_qlora.compute_dtype",
            "set train_qlora.compute_dtype: float16",
        )
    elif settings.compute_dtype == "float16":
        logger.info("float16 has a narrow range: gradients are scaled by the trainer")
