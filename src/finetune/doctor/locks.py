"""`.dvc/tmp` -> one run at a time in this folder, and nothing that a killed run left behind in its way.

What `kill -9` of DVC 3.67.1 in the middle of a stage leaves, as tests/unit/doctor tries: the stage itself, which goes
on and writes its outs beside the one that the next `dvc repro` starts; and `.dvc/tmp/rwlock`, which DVC clears by
itself unless another program has got the recorded number since (in a container one always has), or the file was cut
while it was written: like dvc.lock it is written in place.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from finetune.doctor import lock_file
from finetune.doctor.processes import (
    Process,
    describe,
    dvc_processes,
    holders,
    orphaned_stages,
    own_descriptors,
    runs_dvc,
)
from finetune.errors import DataError, FinetuneError
from finetune.log import logger

# docker/entrypoint.sh takes the same one.
RUN_LOCK = ".dvc/tmp/pipeline.flock"
# DVC's own: the repository's, held while DVC reads or writes its files but not while a stage works.
DVC_LOCK, DVC_RWLOCK = ".dvc/tmp/lock", ".dvc/tmp/rwlock"
# DVC gives up after 3 s.
DVC_LOCK_WAIT_S = 10.0
# A checkpoint of a large model on a slow disk.
STAGE_WAIT_S = 300.0
POLL_S = 0.1


class BusyError(FinetuneError):
    """Another run is at work in this folder."""


@dataclass(frozen=True)
class ReadWriteLock:
    """DVC's record of who reads and writes which paths: its processes by number, or `torn` where it is not JSON."""

    pids: tuple[int, ...]
    torn: bool


def parse_rwlock(content: str) -> ReadWriteLock:
    """The holders named in `.dvc/tmp/rwlock`."""
    try:
        value = json.loads(content)
        entries = [*value.get("write", {}).values(), *(one for many in value.get("read", {}).values() for one in many)]
        return ReadWriteLock(tuple(sorted({int(entry["pid"]) for entry in entries})), torn=False)
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError, ValueError):
        return ReadWriteLock((), torn=True)


@contextmanager
def sole_run(root: Path) -> Iterator[int]:
    """Hold the folder for one run; yields the descriptor, for the DVC below to hold on to if this process is killed.

    A lock that a process above holds already (docker/entrypoint.sh) is this run's. Raises BusyError where another run
    has it, and DataError where `root` is no DVC repository.
    """
    if not (root / ".dvc").is_dir():
        raise DataError("not a DVC repository", root.resolve(), "change to the root of the clone, then: make repro")
    path = root / RUN_LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    inherited = next((number for number in own_descriptors(path) if try_lock(number)), None)
    if inherited is not None:
        yield inherited
        return
    with path.open("r+b") as handle:
        if not try_lock(handle.fileno()):
            raise _busy("another run is at work in this folder", path, holders(path))
        yield handle.fileno()


def heal(root: Path) -> list[str]:
    """Clear what a killed run left, in a folder that `sole_run` holds; returns what was done, in words.

    Stages without a DVC are asked to stop and waited for. Raises BusyError where a DVC that was started by hand is at
    work, or where a stage does not stop, and DataError for merge marks in dvc.lock.
    """
    lock_file.check_merge(root)
    done = []
    with _dvc_lock(root):
        _refuse_beside_living(root)
    if stopped := stop_orphans(root, ask=True):
        done.append(f"stopped what a killed run left at work: {', '.join(stopped)}")
    with _dvc_lock(root):
        rwlock = read_rwlock(root)
        if rwlock.torn or rwlock.pids:
            (root / DVC_RWLOCK).unlink()
            held = "cut while it was written" if rwlock.torn else f"of dead PID {', '.join(map(str, rwlock.pids))}"
            done.append(f"removed {DVC_RWLOCK}, {held}")
        if mended := lock_file.mend(root):
            done.append(mended)
    return done


def stop_orphans(root: Path, *, ask: bool) -> list[str]:
    """Wait for the stages that go on although their DVC is dead, after SIGINT if `ask`; returns their names, sorted.

    On SIGINT training writes a checkpoint after its step, and the next run goes on from there.
    """
    orphans = orphaned_stages(root)
    if ask:
        for process in orphans:
            logger.warning("stage %s goes on without DVC: asking %s to stop and save", process.stage, process.shown())
            _interrupt(process.pid)
    names = sorted({str(process.stage) for process in orphans})
    end = time.monotonic() + STAGE_WAIT_S
    while orphans := orphaned_stages(root):
        if time.monotonic() > end:
            remedy = f"kill -KILL {' '.join(str(process.pid) for process in orphans)}, then run again"
            raise BusyError(f"stage {names[0]} of a killed run does not stop", orphans[0].shown(), remedy)
        time.sleep(POLL_S)
    return names


def living_run(root: Path) -> list[Process]:
    """The DVC processes that `.dvc/tmp/rwlock` names and that are alive; any DVC here if that file is torn."""
    rwlock = read_rwlock(root)
    return dvc_processes(root) if rwlock.torn else [describe(pid) for pid in rwlock.pids if runs_dvc(pid, root)]


def _refuse_beside_living(root: Path) -> None:
    if living := living_run(root):
        raise _busy("another DVC is at work in this folder", root / DVC_RWLOCK, living)


def _busy(what: str, where: Path, processes: list[Process]) -> BusyError:
    if not processes:
        return BusyError(
            what, f"{where}, held in another container or by another user", "wait for it, or stop it there"
        )
    first = processes[0]
    # DVC itself ignores SIGINT while a stage works: it and its stage are one group.
    target = str(first.pid) if "finetune.doctor" in first.command else f"-- -{os.getpgid(first.pid)}"
    remedy = f"wait: tail --pid={first.pid} -f /dev/null; or stop it, which saves a checkpoint: kill -INT {target}"
    return BusyError(what, f"{where}, held by {', '.join(process.shown() for process in processes)}", remedy)


@contextmanager
def _dvc_lock(root: Path) -> Iterator[None]:
    """Hold DVC's own lock, for milliseconds: a DVC whose stage has just ended fails if it waits for it for 3 s."""
    path = root / DVC_LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    with path.open("r+b") as handle:
        end = time.monotonic() + DVC_LOCK_WAIT_S
        while not try_lock(handle.fileno()):
            if time.monotonic() > end:
                raise _busy("another DVC is at work in this folder", path, holders(path))
            time.sleep(POLL_S)
        yield


def read_rwlock(root: Path) -> ReadWriteLock:
    """`.dvc/tmp/rwlock` of a repository, empty where there is none."""
    path = root / DVC_RWLOCK
    return (
        parse_rwlock(path.read_text(encoding="utf-8", errors="replace")) if path.exists() else ReadWriteLock((), False)
    )


def try_lock(descriptor: int) -> bool:
    """Take the lock of an open file for as long as it is open, unless somebody else has it; returns whether."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _interrupt(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGINT)
    except ProcessLookupError:
        return
