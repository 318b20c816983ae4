"""Samples of this machine, of a GPU that is read through NVML, and what they come to."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
from mirror_runs import shown_warnings

from finetune.io import write_text
from finetune.telemetry import Telemetry, read_samples, summarise

UUID = "GPU-00000000-0000-0000-0000-000000000000"


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    with shown_warnings() as shown:
        yield shown


def test_processor_memory_and_speed_are_sampled_while_the_block_runs(tmp_path: Path, warnings: list[str]) -> None:
    path = tmp_path / "run" / "telemetry.jsonl"
    with Telemetry(path, [], interval_s=0.05) as telemetry:
        telemetry.seen(1000)
        time.sleep(0.2)
        telemetry.seen(1600)
        time.sleep(0.2)
    samples = list(read_samples(path))
    assert len(samples) >= 4
    assert [sample["step"] for sample in samples] == list(range(1, len(samples) + 1))
    assert {sample["process"] for sample in samples} == {0}
    assert all(10 < sample["process_memory_megabytes"] < 100_000 for sample in samples)
    assert all(0 <= sample["cpu_utilization_percentage"] <= 100 for sample in samples)
    (rate,) = [sample for sample in samples if "tokens_per_second" in sample]
    assert rate["tokens_per_second"] * rate["tokens_seconds"] == pytest.approx(600, rel=0.02)
    assert warnings == []


def test_a_short_run_has_one_sample_and_a_resumed_one_goes_on_behind_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.jsonl"
    with Telemetry(path, []):
        pass
    with path.open("a") as handle:
        handle.write('{"step": 2, "time')
    with Telemetry(path, []):
        pass
    assert [(sample["step"], sample["process"]) for sample in read_samples(path)] == [(1, 0), (2, 1)]
    assert summarise(list(read_samples(path)))["resumes"] == 1


def test_the_other_processes_of_a_training_write_nothing(tmp_path: Path) -> None:
    with Telemetry(tmp_path / "telemetry.jsonl", [UUID], active=False) as telemetry:
        telemetry.seen(1)
    assert list(tmp_path.iterdir()) == []


def test_without_a_driver_one_warning_and_the_figures_of_the_processor(tmp_path: Path, warnings: list[str]) -> None:
    with Telemetry(tmp_path / "telemetry.jsonl", [UUID], interval_s=0.05):
        time.sleep(0.2)
    assert len(warnings) == 1
    assert "no figures of the GPU" in warnings[0]
    assert {name for sample in read_samples(tmp_path / "telemetry.jsonl") for name in sample} == {
        "step", "time_s", "process", "cpu_utilization_percentage", "process_cpu_utilization_percentage",
        "process_memory_megabytes",
    }  # fmt: skip


def test_a_full_or_missing_disk_ends_the_samples_and_not_the_training(tmp_path: Path, warnings: list[str]) -> None:
    write_text(tmp_path / "file", "")
    with Telemetry(tmp_path / "file" / "telemetry.jsonl", [], interval_s=0.01):
        time.sleep(0.1)
    assert len(warnings) == 1
    assert "no more telemetry" in warnings[0]


def test_a_driver_that_never_answers_holds_the_end_up_for_two_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: time.sleep(60))
    started_s = time.monotonic()
    with Telemetry(tmp_path / "telemetry.jsonl", [UUID]) as telemetry:
        telemetry.seen(1)
    assert time.monotonic() - started_s < 4


def test_a_gpu_gives_what_nvml_lets_it_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(handle: Any) -> float:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    answers = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "nvmlDeviceGetUtilizationRates": lambda handle: SimpleNamespace(gpu=97),
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(used=61_250_000_000),
        "nvmlDeviceGetPowerUsage": lambda handle: 613_250,
        "nvmlDeviceGetTemperature": lambda handle, sensor: refused(handle),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    with Telemetry(tmp_path / "telemetry.jsonl", [UUID]):
        pass
    (sample,) = read_samples(tmp_path / "telemetry.jsonl")
    assert {name: value for name, value in sample.items() if name.startswith("gpu")} == {
        "gpu_0_utilization_percentage": 97.0,
        "gpu_0_memory_usage_megabytes": 61250.0,
        "gpu_0_power_usage_watts": 613.2,
    }


def sample(time_s: float, process: int, **figures: float) -> dict[str, float]:
    return {"step": 0, "time_s": time_s, "process": process, **figures}


def test_energy_is_the_area_under_the_power_of_each_process() -> None:
    power = "gpu_0_power_usage_watts"
    samples = [
        sample(0.0, 0, **{power: 100.0, "gpu_1_power_usage_watts": 360.0}),
        sample(10.0, 0, **{power: 300.0, "gpu_1_power_usage_watts": 360.0}),
        # An hour without a process counts nothing, and neither does a reading that failed.
        sample(3610.0, 1, **{power: 600.0}),
        sample(3616.0, 1, **{power: 600.0}),
        sample(3620.0, 1),
    ]
    summary = summarise(samples)
    # (200 W + 360 W) for 10 s and 600 W for 6 s are 9,200 J.
    assert summary["energy_wh"] == 2.556
    assert (summary["seconds"], summary["resumes"]) == (20.0, 1)
    assert (summary["started_s"], summary["ended_s"]) == (0.0, 3620.0)
    assert summary["figures"][power] == {"mean": 400.0, "p95": 600.0, "max": 600.0}


def test_speed_is_tokens_over_the_seconds_that_they_took() -> None:
    samples = [
        sample(0.0, 0),
        sample(5.0, 0, tokens_per_second=100.0, tokens_seconds=1.0),
        sample(9.0, 0, tokens_per_second=400.0, tokens_seconds=3.0),
    ]
    assert summarise(samples)["tokens_per_s"] == 325.0
    assert "tokens_seconds" not in summarise(samples)["figures"]


def test_the_95th_percentile_is_a_value_that_was_seen() -> None:
    figures = summarise([sample(float(each), 0, x=float(each)) for each in range(1, 101)])["figures"]
    assert figures == {"x": {"mean": 50.5, "p95": 95.0, "max": 100.0}}


def test_what_was_not_seen_is_none() -> None:
    summary = summarise([sample(1.0, 0)])
    assert (summary["energy_wh"], summary["tokens_per_s"], summary["figures"]) == (None, None, {})
    assert summarise([]) == {}


def test_a_file_of_another_crash_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(json.dumps(sample(1.0, 0)).encode() + b"\n\x00\x00\xff\n")
    assert len(list(read_samples(tmp_path / "t"))) == 1
    assert list(read_samples(tmp_path / "missing")) == []
