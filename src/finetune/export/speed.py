"""GGUF files -> tokens a second and peak memory of each on this machine, as llama.cpp serves them on the CPU.

Each file is measured in a process of its own: memory that one model took says nothing about the next. The figures
belong to a machine and an hour, so they go to `.cache/speed.json`, which neither git nor DVC keeps.
"""

from __future__ import annotations

import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import llama_cpp

from finetune.errors import ExportError
from finetune.export.child import run_module
from finetune.io import write_json
from finetune.log import progress

SPEED_FILE = Path(".cache/speed.json")
PROMPT_TOKENS, NEW_TOKENS, RUNS = 128, 32, 3
KIB_PER_MIB = 1024


def measure_speed(
    files: Mapping[str, Path], types: Mapping[str, Mapping[str, Any]], threads: int, target: Path
) -> dict[str, Any]:
    """Write and return {type: prompt_tokens_per_s, new_tokens_per_s, peak_rss_mib, sha256, machine} of the files.

    `types`: the figures of each file, of which its `sha256` is taken.
    """
    machine = machine_name(threads)
    figures = {
        name: {**_measure_apart(file, threads), "sha256": types[name]["sha256"], "machine": machine}
        for name, file in progress(files.items(), len(files), "type", "speed")
    }
    write_json(target, figures)
    return figures


def machine_name(threads: int) -> str:
    """The processor's model and how many threads were used; the architecture where the system names no model."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else None
    return f"{found[1] if found else platform.machine()}, {threads} thread(s)"


def _measure_apart(file: Path, threads: int) -> dict[str, float | None]:
    lines: list[str] = []
    run_module(__name__, [file, threads], file, lines.append)
    try:
        figures: dict[str, float | None] = json.loads(lines[-1])
    except (IndexError, json.JSONDecodeError):
        raise ExportError("the speed measurement wrote no figures", file, "run `dvc repro -f quantize_gguf`") from None
    return figures


def measure_here(file: Path, threads: int) -> dict[str, float | None]:
    """The median speed of three runs, after one to warm up, and this process's peak memory; the cache is F16."""
    model = llama_cpp.Llama(
        str(file), n_ctx=PROMPT_TOKENS + NEW_TOKENS, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    ids = [1 + position % (model.n_vocab() - 1) for position in range(PROMPT_TOKENS)]
    _run(model, ids)
    runs = [_run(model, ids) for _ in range(RUNS)]
    return {
        "prompt_tokens_per_s": round(statistics.median(first for first, _ in runs), 1),
        "new_tokens_per_s": round(statistics.median(second for _, second in runs), 1),
        "peak_rss_mib": peak_rss_mib(),
    }


def _run(model: llama_cpp.Llama, ids: Sequence[int]) -> tuple[float, float]:
    """Tokens a second of reading the prompt, and of NEW_TOKENS tokens one after the other."""
    model.reset()
    start = time.perf_counter()
    model.eval(ids)
    read = time.perf_counter()
    for token in ids[:NEW_TOKENS]:
        model.eval([token])
    made = time.perf_counter()
    return len(ids) / (read - start), NEW_TOKENS / (made - read)


def peak_rss_mib() -> float | None:
    """The most memory that this process has held, with the pages of the model that it has mapped.

    From /proc, as getrusage counts the process that started this one too; None where there is no /proc.
    """
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE) if status.is_file() else None
    return round(int(found[1]) / KIB_PER_MIB, 1) if found else None


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure_here(Path(sys.argv[1]), int(sys.argv[2]))) + "\n")
