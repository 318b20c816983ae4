"""Wall time and peak memory of a command with all the processes that it starts, from /proc."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SAMPLE_EVERY_S = 0.1
KIB = 1024


@dataclass
class Cost:
    """`cpu_s`: processor time of all processes, which says more than `wall_s` on a machine that others use too.

    `peak_process_bytes`: largest resident set of any one process, as the kernel recorded it.

    `peak_tree_bytes`: largest sum over all processes at one time of what each holds, shared pages by share (PSS).
    """

    wall_s: float = 0.0
    cpu_s: float = 0.0
    peak_process_bytes: int = 0
    peak_tree_bytes: int = 0


def run_measured(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Cost:
    """Run a command to its end; raises CalledProcessError when it fails."""
    cost, ended = Cost(), threading.Event()
    started = time.monotonic()
    with subprocess.Popen(command, env={**os.environ, **(environment or {})}) as process:
        sampler = threading.Thread(target=_sample, args=(process.pid, cost, ended))
        sampler.start()
        process.wait()
        cost.wall_s = time.monotonic() - started
        ended.set()
        sampler.join()
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)
    return cost


def machine() -> dict[str, object]:
    """What a result depends on besides the code."""
    model = next(
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    )
    memory_kib = int(Path("/proc/meminfo").read_text(encoding="utf-8").split()[1])
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": model,
        "memory_gib": round(memory_kib / (1 << 20), 1),
        "date": time.strftime("%Y-%m-%d"),
    }


def _sample(root: int, cost: Cost, ended: threading.Event) -> None:
    cpu_s: dict[int, float] = {}
    while not ended.wait(SAMPLE_EVERY_S):
        tree = 0
        for pid in _descendants(root):
            with suppress(OSError):
                cost.peak_process_bytes = max(cost.peak_process_bytes, _field(pid, "status", "VmHWM:"))
                tree += _field(pid, "smaps_rollup", "Pss:")
                # The name of the program, in parentheses, may hold spaces; user and system time are fields 14 and 15.
                fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
                cpu_s[pid] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        cost.peak_tree_bytes = max(cost.peak_tree_bytes, tree)
        cost.cpu_s = sum(cpu_s.values())


def _descendants(root: int) -> list[int]:
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        with suppress(OSError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                waiting += map(int, (task / "children").read_text(encoding="ascii").split())
    return found


def _field(pid: int, file: str, name: str) -> int:
    for line in Path(f"/proc/{pid}/{file}").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * KIB
    return 0
