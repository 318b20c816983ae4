"""A clone of this working tree in another folder, and dvc run in it as `make repro` does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 900
ON_CORES = """
import os, sys
os.sched_setaffinity(0, map(int, sys.argv[1].split(",")))
sys.stderr.write("cores: %d\\n" % len(os.sched_getaffinity(0)))
sys.stderr.flush()
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def run(command: list[str], cwd: Path, typed: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a clone, `typed` into it, with the Python and tools of this environment and no MLflow of it."""
    variables = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "DVC_"))},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(cwd / "src"),
        "FINETUNE_TOOLS": str(Path(os.environ.get("FINETUNE_TOOLS", ROOT / ".tools")).resolve()),
        "DVC_NO_ANALYTICS": "1",
        **environment,
    }
    return subprocess.run(
        command, cwd=cwd, env=variables, capture_output=True, text=True, check=False, timeout=TIMEOUT_S, input=typed
    )


def git(cwd: Path, *arguments: str) -> str:
    """Run git as a person without a configuration would."""
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *identity, *arguments], cwd=cwd, capture_output=True, text=True, check=True).stdout


def clone(target: Path) -> Path:
    """Copy what git tracks, or would track, into a new repository with one commit."""
    listed = git(ROOT, "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    for name in sorted(set(filter(None, listed.split("\0")))):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    git(target, "init", "--quiet")
    git(target, "add", "--all")
    git(target, "commit", "--quiet", "--message", "clone")
    return target


def repro(cwd: Path, *arguments: str, cores: Iterable[int] | None = None, **environment: str) -> str:
    """`dvc repro`, which must succeed, on some cores or on those of the caller; returns what it printed."""
    pinned = [] if cores is None else ["-c", ON_CORES, ",".join(map(str, cores))]
    finished = run([sys.executable, *pinned, "-m", "dvc", "repro", *arguments], cwd, **environment)
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    return finished.stdout + finished.stderr


def usable_cores() -> list[int]:
    """Every core that this process may ask for, also when it was started on some of them."""
    before = os.sched_getaffinity(0)
    # The kernel leaves out those that the container or cgroup does not have.
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    usable = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, before)
    return usable


def core_count(output: str) -> int:
    """How many cores a `repro` with `cores` said that it ran on."""
    (line,) = [line for line in output.splitlines() if line.startswith("cores: ")]
    return int(line.removeprefix("cores: "))


def stages_run(output: str) -> list[str]:
    """The names of the stages that dvc executed, in order."""
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage '")]


def out_hashes(cwd: Path) -> dict[str, str]:
    """Path -> hash of every out, metric and plot in dvc.lock."""
    lock: dict[str, Any] = YAML(typ="safe", pure=True).load((cwd / "dvc.lock").read_text(encoding="utf-8"))
    return {out["path"]: out["md5"] for stage in lock["stages"].values() for out in stage["outs"]}
