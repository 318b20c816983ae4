"""The whole train_qlora process of the smoke recipe beside plain TRL: `python benchmarks/train_process.py [ROUNDS]`.

All train the same adapter on the same packed rows in NF4, with checkpoints and validations at the same steps, by turns,
from the start of Python to the adapter on disk. `trl` is plain_trl.py as TRL does it by itself: adapter in bfloat16,
whatever kernels this processor has. `trl_same_arithmetic` does what our steps do: float32, on the code path that
finetune.runtime pins so that every processor gives the same bytes; torch.compile, which compiles nothing here, stays on
as in any script. The bars are against that one; the ratio to `trl` is the price of equal bytes. Ours also hashes its
inputs, logs every step to disk and copies the figures to MLflow, in a database that stays between the rounds as a
user's does. The first step has been taken when its line is in our log, or
when TRL's callback says so; it is timed in starts of its own, which end there: more of these go into a minute.
Reads data/split, models/tokenizer and models/base of BENCHMARK_INPUTS, or of this repository as `make repro` leaves
them. Three rounds if not said otherwise; writes train_process.json.
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from process_tree import machine

from finetune.io import read_json, write_json
from finetune.params import load_params
from finetune.runtime import PINNED_ENVIRONMENT

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PARAMS = ROOT / "recipes/smoke/params.yaml"
ROUNDS, STARTS = 3, 15
POLL_S, SETTLE_S = 0.02, 3.0
KIB = 1024
MAX_RATIO = 1.1
# Our stage sets both for itself. On a machine that others use too, threads that spin while they wait would cost TRL
# much of its time: it is given the better way.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
WAYS = ("ours", "trl_same_arithmetic", "trl")
FIGURES = ("wall_s", "cpu_s", "peak_rss_gib")
OUTS = ("out/adapter", "out/train_qlora.json", "out/train_log.csv")


def make_folder(root: Path, folder: Path) -> None:
    """A folder with the inputs of the stage, and the smoke recipe as its params.yaml."""
    for name in ("data", "models"):
        (folder / name).symlink_to(root / name)
    shutil.copyfile(PARAMS, folder / "params.yaml")


def our_command() -> list[str]:
    """The stage as dvc.yaml starts it, with outs of its own."""
    inputs = ("data/split", "models/tokenizer", "models/base")
    return [sys.executable, "-m", "finetune.stages.train_qlora", *inputs, *OUTS]


def plain_run(folder: Path, *, float32_adapter: bool) -> dict[str, Any]:
    """What plain_trl.py reads, from the same params.yaml."""
    params = load_params(folder / "params.yaml")
    return {
        "base": "models/base",
        "tokenizer": "models/tokenizer",
        "rows": "data/split/packed.parquet",
        "validation": "data/split/validation.parquet",
        "adapter": "plain/adapter",
        "checkpoints": "plain/checkpoints",
        "report": "plain/report.json",
        "seed": params.seed,
        "threads": params.cpu_threads,
        "train_qlora": params.train_qlora.model_dump(),
        "resume": None,
        "kill_at_step": None,
        "float32_adapter": float32_adapter,
    }


def has_step(folder: Path) -> bool:
    """Whether our log holds a line, or TRL's report the time of its first step."""
    with suppress(FileNotFoundError):
        if "first_step_at_s" in (folder / "plain/report.json").read_text(encoding="utf-8"):
            return True
    return any(log.stat().st_size for log in (folder / ".cache/checkpoints").glob("*/train_log.jsonl"))


def start(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """The command in `folder`, in a session of its own, writing output.log."""
    with (folder / "output.log").open("w", encoding="utf-8") as output:
        return subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def first_step(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> dict[str, float]:
    """Wall and processor seconds from the start of the command to its first step, at which it is killed.

    Raises CalledProcessError when it ends before.
    """
    started = time.monotonic()
    process = start(command, folder, environment)
    while not has_step(folder):
        if process.poll() is not None:
            raise subprocess.CalledProcessError(process.returncode, command, (folder / "output.log").read_bytes())
        time.sleep(POLL_S)
    costs = {"first_step_s": time.monotonic() - started, "first_step_cpu_s": cpu_s(process.pid)}
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # Our sender has a session of its own, and needs a moment to see that the training is gone.
    time.sleep(SETTLE_S)
    return costs


def cpu_s(pid: int) -> float:
    """Processor seconds that a running process has used, its children left out (proc(5): utime and stime)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> dict[str, float]:
    """Run a command in `folder`: wall and processor seconds, and peak resident set of its largest process.

    Raises CalledProcessError when it fails.
    """
    started = time.monotonic()
    process = start(command, folder, environment)
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, (folder / "output.log").read_bytes())
    return {
        "wall_s": wall_s,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_rss_gib": usage.ru_maxrss * KIB / (1 << 30),
    }


def commands(folder: Path) -> dict[str, tuple[list[str], Mapping[str, str]]]:
    """Way -> its command and environment."""
    plain = [sys.executable, str(HERE / "plain_trl.py")]
    arithmetic = {name: value for name, value in PINNED_ENVIRONMENT.items() if name != "TORCHDYNAMO_DISABLE"}
    return {
        "ours": (our_command(), {**ENVIRONMENT, "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}"}),
        "trl": ([*plain, "trl.json"], ENVIRONMENT),
        "trl_same_arithmetic": ([*plain, "trl_same_arithmetic.json"], {**ENVIRONMENT, **arithmetic}),
    }


def clear(folder: Path) -> None:
    """Remove what a run has left, so that each begins from nothing."""
    for left in (".cache", "out", "plain"):
        shutil.rmtree(folder / left, ignore_errors=True)
    (folder / "plain").mkdir()


def one_start(folder: Path, order: Sequence[str]) -> dict[str, dict[str, float]]:
    """Way -> costs of its way to the first step, in that order."""
    costs = {}
    for way in order:
        clear(folder)
        command, environment = commands(folder)[way]
        costs[way] = first_step(command, folder, environment)
    return costs


def one_round(folder: Path, order: Sequence[str]) -> dict[str, dict[str, float]]:
    """All ways once, in that order, each from nothing."""
    costs = {}
    for way in order:
        clear(folder)
        command, environment = commands(folder)[way]
        costs[way] = {**measure(command, folder, environment), **trained(folder, way)}
    return costs


def trained(folder: Path, way: str) -> dict[str, float]:
    """Steps and last validation loss, by which a reader sees that both did the work."""
    if way == "ours":
        metrics = read_json(folder / "out/train_qlora.json")
        return {name: metrics[name] for name in ("steps", "validation_loss")}
    report = read_json(folder / "plain/report.json")
    return {"steps": report["steps"], "validation_loss": report["validation_loss"][-1]}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Least, median and most."""
    return {
        "min": round(min(values), 3),
        "median": round(statistics.median(values), 3),
        "max": round(max(values), 3),
    }


def compare(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Ratio of ours to theirs: of the medians, and round by round."""
    return {
        "of_medians": round(statistics.median(ours) / statistics.median(theirs), 3),
        "by_round": spread([our / their for our, their in zip(ours, theirs, strict=True)]),
    }


def summary(
    starts: Sequence[Mapping[str, Mapping[str, float]]], rounds: Sequence[Mapping[str, Mapping[str, float]]]
) -> dict[str, Any]:
    """The spread of each figure by way, and the ratios of ours to TRL's."""
    values = {
        way: {
            **{name: [each[way][name] for each in starts] for name in ("first_step_s", "first_step_cpu_s")},
            **{name: [each[way][name] for each in rounds] for name in FIGURES},
        }
        for way in WAYS
    }
    ways: dict[str, dict[str, Any]] = {
        way: {
            **{name: spread(seen) for name, seen in values[way].items()},
            **{name: rounds[-1][way][name] for name in ("steps", "validation_loss")},
        }
        for way in WAYS
    }
    ratios = {
        f"ours_over_{way}": {name: compare(values["ours"][name], values[way][name]) for name in values[way]}
        for way in WAYS[1:]
    }
    own = ratios["ours_over_trl_same_arithmetic"]
    fast = own["wall_s"]["of_medians"] <= MAX_RATIO and own["first_step_s"]["of_medians"] <= 1.0
    same_work = len({ways[way]["steps"] for way in WAYS}) == 1
    return {"ways": ways, **ratios, "passed": fast and same_work}


def say(line: str) -> None:
    """A line for who watches."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    """Run the rounds and write the result."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCHMARK_FOLDER")) as name:
        folder = Path(name)
        make_folder(Path(os.environ.get("BENCHMARK_INPUTS", ROOT)).resolve(), folder)
        for way in WAYS[1:]:
            write_json(folder / f"{way}.json", plain_run(folder, float32_adapter=way != "trl"))
        # The first round fills the page cache and makes the MLflow database: it is not counted.
        starts = [one_start(folder, WAYS[::-1] if number % 2 else WAYS) for number in range(STARTS + 1)][1:]
        say(f"to the first step: {starts}")
        rounds = []
        for number in range(count):
            rounds.append(one_round(folder, WAYS if number % 2 else WAYS[::-1]))
            say(f"round {number + 1}: {rounds[-1]}")
    result = {**machine(), "rounds": count, "starts": STARTS, "max_ratio": MAX_RATIO, **summary(starts, rounds)}
    write_json(Path(__file__).with_suffix(".json"), result)
    say(str(result))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
