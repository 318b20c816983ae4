"""the machine while a model trains -> telemetry.jsonl, every few seconds: utilisation, power, memory, speed; a summary.

Energy is the integral of NVML's power readings over the samples of each process. NVML is asked, never CUDA: it is a
library of the driver that needs no CUDA context and may be called from any thread
(https://docs.nvidia.com/deploy/nvml-api/nvml-api-reference.html). Names and units are those of MLflow's system metrics.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, Self

import psutil
import pynvml

from finetune.log import logger

TELEMETRY_FILE = "telemetry.jsonl"
SAMPLE_S, FIRST_SAMPLE_S, JOIN_S = 5.0, 1.0, 2.0
MEGABYTE, SECONDS_PER_HOUR, MILLIWATTS_PER_WATT = 1e6, 3600, 1000
# What a sample holds besides its figures.
LABELS = {"step", "time_s", "process", "tokens_seconds"}
Sample = dict[str, float]


class Telemetry:
    """Samples on a thread of its own, one JSON line each, appended to `path`; use it in a `with` block.

    `gpu_uuids`: NVML's names of the GPUs to watch (`finetune.hardware.gpu_uuids`). A line holds `step` (its number in
    the file, from 1), `time_s` (Unix time), `process` (how many processes had written before) and the figures. What
    cannot be read is left out, and said once. Nothing here raises into the training. Of several training processes on
    a machine one is `active`; it sees all GPUs.
    """

    def __init__(
        self, path: Path, gpu_uuids: Sequence[str], interval_s: float = SAMPLE_S, *, active: bool = True
    ) -> None:
        self.path, self.gpu_uuids, self.interval_s, self.active = path, gpu_uuids, interval_s, active
        self._gpus: list[Any] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
        # One tuple, so that the thread never sees half of it: seconds on the monotonic clock, tokens until then.
        self._seen: tuple[float, int] | None = None
        self._counted: tuple[float, int] | None = None

    def __enter__(self) -> Self:
        """Start sampling."""
        if self.active:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take a last sample and stop; a thread that a driver holds is left behind after 2 s."""
        self._stop.set()
        if self.active:
            self._thread.join(JOIN_S)

    def seen(self, tokens: int) -> None:
        """Note that `tokens` went through the model in this process so far; costs no more than a clock reading."""
        self._seen = (time.monotonic(), tokens)

    def _run(self) -> None:
        try:
            self._sample_until_the_end()
        except OSError as fault:
            logger.warning("no more telemetry: %s", fault)

    def _sample_until_the_end(self) -> None:
        self._gpus = _handles(self.gpu_uuids)
        known = list(read_samples(self.path))
        step, number = len(known), known[-1]["process"] + 1 if known else 0
        # A crash may have torn the last line of an earlier process: it must not take the next one with it.
        opening = "\n" if self.path.is_file() else ""
        process = psutil.Process()
        # Both give the share since their last call, so the first call says nothing.
        process.cpu_percent()
        psutil.cpu_percent()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        pause_s = min(FIRST_SAMPLE_S, self.interval_s)
        while True:
            ended = self._stop.wait(pause_s)
            step, pause_s = step + 1, self.interval_s
            sample = {"step": step, "time_s": round(time.time(), 3), "process": number}
            figures = {**_host(process), **_gpu_figures(self._gpus), **self._speed()}
            with self.path.open("a", encoding="utf-8") as handle:
                handle.write(opening + json.dumps({**sample, **figures}) + "\n")
            opening = ""
            if ended:
                return

    def _speed(self) -> Sample:
        before, self._counted = self._counted, self._seen
        if before is None or self._counted is None or before == self._counted:
            return {}
        seconds = self._counted[0] - before[0]
        rate = (self._counted[1] - before[1]) / seconds
        return {"tokens_per_second": round(rate, 1), "tokens_seconds": round(seconds, 3)}


def _handles(uuids: Sequence[str]) -> list[Any]:
    if not uuids:
        return []
    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]
    except pynvml.NVMLError as fault:
        logger.warning("telemetry: no figures of the GPU, as NVML says: %s", fault)
        return []


def _host(process: psutil.Process) -> Sample:
    """CPU of the machine (100 is all of it) and of this process (100 is one core), and this process's memory."""
    return {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "process_cpu_utilization_percentage": process.cpu_percent(),
        "process_memory_megabytes": round(process.memory_info().rss / MEGABYTE, 1),
    }


def _gpu_figures(handles: Sequence[Any]) -> Sample:
    """Utilisation, memory, power and temperature of each device; a figure that a device refuses is left out."""
    figures: Sample = {}
    for index, handle in enumerate(handles):
        for name, read in GPU_FIGURES.items():
            try:
                figures[f"gpu_{index}_{name}"] = round(read(handle), 1)
            except pynvml.NVMLError:
                continue
    return figures


GPU_FIGURES: dict[str, Callable[[Any], float]] = {
    "utilization_percentage": lambda handle: float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu),
    "memory_usage_megabytes": lambda handle: pynvml.nvmlDeviceGetMemoryInfo(handle).used / MEGABYTE,
    "power_usage_watts": lambda handle: pynvml.nvmlDeviceGetPowerUsage(handle) / MILLIWATTS_PER_WATT,
    "temperature_celsius": lambda handle: float(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
}


def read_samples(path: Path) -> Iterator[Sample]:
    """The samples of a file; none where it is missing, and a line torn by a crash is left out."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(json.JSONDecodeError):
            yield json.loads(line)


def summarise(samples: Sequence[Sample]) -> dict[str, Any]:
    """What the samples of one run come to, its resumes included; empty without a sample.

    `started_s` and `ended_s` (Unix time), `seconds` (from first to last sample, summed over processes), `resumes`,
    `tokens_per_s` (None where no rate was seen), `energy_wh` (all GPUs; None without power readings) and `figures`:
    name -> mean, p95 (nearest rank) and max.
    """
    if not samples:
        return {}
    processes = [list(group) for _, group in groupby(samples, key=lambda sample: sample["process"])]
    names = sorted({name for sample in samples for name in sample} - LABELS)
    return {
        "started_s": samples[0]["time_s"],
        "ended_s": samples[-1]["time_s"],
        "seconds": round(sum(group[-1]["time_s"] - group[0]["time_s"] for group in processes), 1),
        "resumes": len(processes) - 1,
        "tokens_per_s": _tokens_per_s(samples),
        "energy_wh": _energy_wh(processes, [name for name in names if name.endswith("_power_usage_watts")]),
        "figures": {name: _statistics([sample[name] for sample in samples if name in sample]) for name in names},
    }


def _statistics(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    p95 = ordered[math.ceil(0.95 * len(ordered)) - 1]
    return {"mean": round(sum(ordered) / len(ordered), 1), "p95": p95, "max": ordered[-1]}


def _tokens_per_s(samples: Sequence[Mapping[str, float]]) -> float | None:
    rated = [
        (sample["tokens_per_second"], sample["tokens_seconds"]) for sample in samples if "tokens_seconds" in sample
    ]
    seconds = sum(each for _, each in rated)
    return round(sum(rate * each for rate, each in rated) / seconds, 1) if seconds else None


def _energy_wh(processes: Sequence[Sequence[Sample]], powers: Sequence[str]) -> float | None:
    """Trapezoids between neighbouring samples of one process: nothing is counted while none ran."""
    if not powers:
        return None
    joules = sum(
        (first[name] + second[name]) / 2 * (second["time_s"] - first["time_s"])
        for samples in processes
        for first, second in pairwise(samples)
        for name in powers
        if name in first and name in second
    )
    return round(joules / SECONDS_PER_HOUR, 3)
