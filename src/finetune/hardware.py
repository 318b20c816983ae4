"""this machine -> its processor, memory, GPUs, driver and CUDA version, in words and numbers."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import psutil
import pynvml
import torch


def describe_hardware() -> dict[str, Any]:
    """`system`, `cpu` (model, physical_cores, usable_threads), `memory_bytes`, `gpus`, `driver`, `cuda`.

    A driver or a CUDA version that is not there is None. `gpus`: those that torch sees, each with name, memory_bytes,
    compute_capability and peak_allocated_bytes, the most that this process has held in tensors.
    """
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": {
            "model": cpu_model(),
            "physical_cores": psutil.cpu_count(logical=False),
            "usable_threads": usable_threads(),
        },
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "driver": _driver() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
    }


def cpu_model() -> str:
    """The processor's model, or its architecture where the system names none."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else None
    return found[1] if found else platform.machine()


def usable_threads() -> int:
    """How many threads this process may run at once; a container is often given fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu_uuids() -> list[str]:
    """NVML's names of the GPUs that torch sees: the two number them differently, and some may be hidden."""
    return [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in range(torch.cuda.device_count())]


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(index),
    }


def _driver() -> str | None:
    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None
