"""Time and peak memory of the whole smoke pipeline, forced, in this clone: `python benchmarks/pipeline_cost.py`.

Writes benchmarks/pipeline_cost.json. Peak memory is the largest resident set of any one process of the run, as the
kernel accounts for waited-for children (getrusage), so that nothing is sampled and nothing is missed.
"""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

from finetune.io import write_json

RESULT = Path(__file__).with_suffix(".json")
STAGE_LINE = "Running stage '"


def main() -> int:
    """Run `dvc repro --force` and record wall seconds by stage, in total, and the peak resident set."""
    started = time.monotonic()
    seconds: dict[str, float] = {}
    stage, since = "dvc", started
    command = [sys.executable, "-m", "dvc", "repro", "--force"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            sys.stdout.write(line)
            if line.startswith(STAGE_LINE):
                now = time.monotonic()
                seconds[stage] = seconds.get(stage, 0.0) + now - since
                stage, since = line.split("'")[1], now
    ended = time.monotonic()
    seconds[stage] = seconds.get(stage, 0.0) + ended - since
    if process.returncode != 0:
        return process.returncode
    peak_kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    result = {
        "cores": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "wall_s": round(ended - started, 1),
        "wall_s_by_stage": {name: round(value, 1) for name, value in seconds.items()},
        "peak_rss_gib": round(peak_kib / (1 << 20), 3),
    }
    write_json(RESULT, result)
    sys.stdout.write(f"pipeline: {result['wall_s']} s, peak {result['peak_rss_gib']} GiB; wrote {RESULT}\n")
    return 0


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    sys.exit(main())
