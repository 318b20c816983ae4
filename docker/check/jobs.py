"""A command in a container: run to its end, or started and stopped as `docker stop` does it.

podman, where it can start a container, has process numbers of its own, no network, and `stop` itself. buildah's chroot
has none of these: there the stop signal is sent to the container's first process, which is all that `stop` does.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine import CheckError, Engine, buildah_engine, call, configuration, docker_engine, make_base, must

STOP_S, POLL_S = 300, 0.05


@dataclass(frozen=True)
class Job:
    """One command, or the image's own where `arguments` is empty. `name` is given to what is to be stopped."""

    image: str
    arguments: Sequence[str] = ()
    uid: int = 12345
    folder: Path | None = None
    name: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict)


def find_engine(work: Path, wanted: str) -> Engine:
    """Docker where its daemon answers, else podman if it runs here, else buildah; `wanted` names one, or is `any`."""
    docker = docker_engine(work) if wanted in ("any", "docker") else None
    if docker:
        return docker
    if wanted == "docker":
        raise CheckError("no Docker daemon answers\n  remedy: start it, or: make image-check ENGINE=buildah")
    buildah = buildah_engine(work)
    for runtime in ("crun", "runc") if wanted in ("any", "podman") and shutil.which("podman") else ():
        podman = Engine("podman", ("podman", "--runtime", runtime), work, buildah.environment)
        probe = Job(make_base(buildah, "plain"), ("true",), uid=0)
        if shutil.which(runtime) and run(podman, probe).returncode == 0:
            return podman
    if wanted == "podman":
        raise CheckError("podman cannot start a container here\n  remedy: make image-check ENGINE=buildah")
    return buildah


def command_of(engine: Engine, job: Job) -> list[str]:
    """The command line of a job."""
    mount = [] if job.folder is None else ["--volume", f"{job.folder}:{job.folder}"]
    variables = [flag for name, value in job.variables.items() for flag in ("--env", f"{name}={value}")]
    user = ["--user", f"{job.uid}:{job.uid}"]
    if engine.command:
        place = [] if job.folder is None else ["--workdir", str(job.folder)]
        named = [] if job.name is None else ["--name", job.name]
        # podman would write an unknown UID into /etc/passwd.
        unknown = ["--passwd=false"] if engine.name == "podman" else []
        flags = ["--rm", "--network", "none", *unknown, *named, *user, *mount, *place, *variables]
        return [*engine.command, "run", *flags, job.image, *job.arguments]
    container = must(engine, "buildah", "from", "--pull-never", job.image).strip().splitlines()[-1]
    config = configuration(engine, job.image)
    command = [*(config.get("Entrypoint") or []), *(job.arguments or config.get("Cmd") or [])]
    place = ["--workingdir", str(job.folder or config.get("WorkingDir") or "/")]
    return ["buildah", "run", "--isolation", "chroot", *user, *mount, *place, *variables, container, "--", *command]


def run(engine: Engine, job: Job) -> subprocess.CompletedProcess[str]:
    """Run a job to its end; stderr comes with stdout."""
    return call(engine, *command_of(engine, job))


def start(engine: Engine, job: Job, log: Path) -> subprocess.Popen[bytes]:
    """Start a job; its output goes to `log`."""
    environment = {**os.environ, **engine.environment}
    with log.open("wb") as handle:
        return subprocess.Popen(
            command_of(engine, job), env=environment, stdin=subprocess.DEVNULL, stdout=handle, stderr=handle
        )


def stop(engine: Engine, job: Job, process: subprocess.Popen[bytes], *, kill: bool) -> int:
    """End a job by the image's stop signal to its first process, or by SIGKILL to all; returns its exit code."""
    if process.poll() is not None:
        return process.returncode
    if engine.command and kill:
        must(engine, *engine.command, "kill", "--signal", "KILL", str(job.name))
    elif engine.command:
        must(engine, *engine.command, "stop", "--time", str(STOP_S), str(job.name))
    else:
        below = descendants(process.pid)
        first = [pid for pid in below if _program(pid) == "tini"][:1]
        number = signal.SIGKILL if kill else signal.Signals[configuration(engine, job.image)["StopSignal"]]
        for pid in below if kill else first:
            _signal(pid, number)
    return process.wait(timeout=STOP_S)


def descendants(pid: int) -> list[int]:
    """The processes below `pid`, parents first."""
    found, waiting = [], [pid]
    while waiting:
        for task in Path(f"/proc/{waiting.pop(0)}/task").glob("*/children"):
            children = [int(number) for number in task.read_text().split()]
            found += children
            waiting += children
    return found


def _program(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/exe").readlink().name
    except OSError:
        return ""


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def wait_until(condition: Callable[[], bool], what: str, process: subprocess.Popen[bytes], limit_s: int = 600) -> None:
    """Wait while a started job works; raises CheckError where it ends before, or takes too long."""
    end = time.monotonic() + limit_s
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            raise CheckError(f"{what}: not seen; the job's exit code is {process.poll()}")
        time.sleep(POLL_S)
