"""What NVML says of the GPU that torch uses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finetune.hardware import describe_hardware, gpu_uuids
from finetune.telemetry import Telemetry, read_samples

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run `make gpu-test` on a GPU host"),
]
GIB = 1 << 30


def test_the_gpu_of_torch_is_the_one_that_is_sampled(tmp_path: Path) -> None:
    held = torch.empty(GIB, dtype=torch.uint8, device="cuda")
    with Telemetry(tmp_path / "telemetry.jsonl", gpu_uuids()):
        torch.cuda.synchronize()
    (sample,) = read_samples(tmp_path / "telemetry.jsonl")
    assert sample["gpu_0_memory_usage_megabytes"] > held.numel() / 1e6
    assert sample["gpu_0_power_usage_watts"] > 10
    assert 0 <= sample["gpu_0_utilization_percentage"] <= 100
    assert 10 < sample["gpu_0_temperature_celsius"] < 110
    hardware = describe_hardware()
    assert hardware["driver"]
    assert hardware["gpus"][0]["peak_allocated_bytes"] >= GIB
