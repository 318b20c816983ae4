"""A small DVC repository with a stage that works for a while, saves when it is stopped, and goes on from there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from finetune.doctor.processes import dvc_processes, orphaned_stages

ROOT = Path(__file__).resolve().parents[3]
# Steps of 0.05 s; SIGINT and SIGTERM finish the step, save its number and exit 75, and a second one ends the process at
# once, as in training.
STAGE = """
import pathlib, signal, sys, time
stops, numbers = [], (signal.SIGINT, signal.SIGTERM)
def stop(*_):
    stops.append(1)
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)
for number in numbers:
    signal.signal(number, stop)
state, log, end = pathlib.Path("state"), pathlib.Path("log"), int(pathlib.Path("steps").read_text())
step = int(state.read_text()) if state.exists() else 0
with log.open("a") as handle:
    handle.write(f"from {step}\\n")
while step < end:
    time.sleep(0.05)
    step += 1
    if stops:
        time.sleep(1)
        state.write_text(str(step))
        sys.exit(75)
pathlib.Path("out").write_text("done")
"""
PIPELINE = """
stages:
  first:
    cmd: cp steps first
    deps: [steps]
    outs: [first]
  train:
    cmd: python work.py
    deps: [first]
    outs: [out]
"""
LIMIT_S = 60.0


def environment() -> dict[str, str]:
    """This Python and this package, without what an outer DVC or make has set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "MAKE", "MFLAGS"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT / "src"), "SHELL": "/bin/sh", "DVC_NO_ANALYTICS": "true"}


def make_repository(folder: Path, *, steps: int) -> Path:
    """A committed repository whose second stage takes `steps` steps."""
    folder.mkdir()
    (folder / "work.py").write_text(STAGE)
    (folder / "dvc.yaml").write_text(PIPELINE)
    (folder / "steps").write_text(str(steps))
    # The place of DVC's record of hashes, which is outside the repository otherwise.
    config = "[core]\n    analytics = false\n    check_update = false\n    site_cache_dir = .dvc/site\n"
    for command in (["git", "init", "--quiet"], [sys.executable, "-m", "dvc", "init", "--quiet"]):
        subprocess.run(command, cwd=folder, env=environment(), check=True)
    (folder / ".dvc" / "config").write_text(config)
    return folder


def long_run(parent: Path) -> Iterator[Path]:
    """For a fixture: a repository whose stage works for 100 s; what a failed test leaves at work is killed."""
    yield make_repository(parent / "repo", steps=2000)
    for process in [*dvc_processes(parent), *orphaned_stages(parent / "repo")]:
        kill(process.pid)


def start(folder: Path, *module: str) -> subprocess.Popen[str]:
    """Start `python -m MODULE ...` in the folder, in a group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", *module],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
    )


def repro(folder: Path) -> tuple[int, str]:
    """Run the pipeline to its end; returns the exit code and what was shown."""
    process = start(folder, "finetune.doctor.repro")
    shown, _ = process.communicate(timeout=LIMIT_S)
    return process.returncode, shown


def wait_until(met: Callable[[], bool]) -> None:
    """Wait for a condition, or fail after LIMIT_S."""
    end = time.monotonic() + LIMIT_S
    while not met():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def wait_for_stage(folder: Path, entries: int = 1) -> None:
    """Wait until the working stage has begun `entries` times."""
    log = folder / "log"
    wait_until(lambda: log.exists() and log.read_text().count("from") >= entries)


def child_of(pid: int) -> int:
    """The only child of a process."""
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


def kill(pid: int) -> None:
    """`kill -9`."""
    os.kill(pid, signal.SIGKILL)
