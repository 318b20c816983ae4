"""/proc -> who holds a file open, who runs DVC in a folder, and which stages go on although their DVC is dead.

Where there is no /proc (macOS), a process is known by its number alone: a recorded number that lives counts as DVC.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    """A running process. `stage`: the DVC stage that it, or a process above it, was started for; else None."""

    pid: int
    command: str
    stage: str | None

    def shown(self) -> str:
        """How a message names it."""
        return f"PID {self.pid} ({self.command[:100]})"


def holders(file: Path) -> list[Process]:
    """The other processes that hold `file` open, by number; those of other users and containers are not seen."""
    wanted = file.stat()
    return [describe(pid) for pid in _pids() if any(_same_file(link, wanted) for link in _entries(pid, "fd"))]


def own_descriptors(file: Path) -> list[int]:
    """The descriptors of this process on `file`, such as one that a shell opened before it."""
    wanted = file.stat()
    return sorted(int(link.name) for link in _entries(os.getpid(), "fd") if _same_file(link, wanted))


def runs_dvc(pid: int, root: Path) -> bool:
    """Whether this process is a living DVC at work below `root`; its number may have gone to another program since."""
    if not PROC.is_dir():
        return _exists(pid)
    folder = _link(pid, "cwd")
    return _is_dvc(pid) and folder is not None and folder.is_relative_to(root.resolve())


def dvc_processes(root: Path) -> list[Process]:
    """Every DVC at work below `root`, by number."""
    return [describe(pid) for pid in _pids() if runs_dvc(pid, root)]


def orphaned_stages(root: Path) -> list[Process]:
    """Every process of a stage that was started in `root` and has no DVC above it any more, by number.

    DVC gives each stage DVC_ROOT and DVC_STAGE. `dvc exp run --temp` gives the same DVC_ROOT to copies elsewhere.
    """
    folder = root.resolve()
    found = []
    for pid in _pids():
        variables = _variables(pid)
        here = variables.get("DVC_ROOT") == str(folder) and _link(pid, "cwd") == folder
        if here and "DVC_STAGE" in variables and not any(_is_dvc(above) for above in _ancestors(pid)):
            found.append(describe(pid))
    return found


def has_ended(pid: int) -> bool:
    """Whether a process has ended, also when nobody has asked for its exit code yet; False where there is no /proc."""
    return PROC.is_dir() and not _arguments(pid)


def describe(pid: int) -> Process:
    """A process with its command line, which is empty once it has ended."""
    return Process(pid, " ".join(_arguments(pid)), _variables(pid).get("DVC_STAGE"))


def _is_dvc(pid: int) -> bool:
    # `dvc`, `python /path/bin/dvc`, `python -m dvc`
    return any(Path(argument).name == "dvc" for argument in _arguments(pid)[:4])


def _ancestors(pid: int) -> Iterator[int]:
    while pid > 1:
        # The name in parentheses may hold anything, also parentheses: the parent is the second field after the last.
        fields = _read(pid, "stat").rpartition(")")[2].split()
        if len(fields) < 2:
            return
        pid = int(fields[1])
        yield pid


def _pids() -> list[int]:
    """All other processes, by number."""
    numbers = sorted(int(folder.name) for folder in PROC.glob("[0-9]*"))
    return [pid for pid in numbers if pid != os.getpid()]


def _entries(pid: int, name: str) -> list[Path]:
    try:
        return list((PROC / str(pid) / name).iterdir())
    except OSError:
        return []


def _same_file(link: Path, wanted: os.stat_result) -> bool:
    try:
        return os.path.samestat(link.stat(), wanted)
    except OSError:
        return False


def _arguments(pid: int) -> list[str]:
    return [part for part in _read(pid, "cmdline").split("\0") if part]


def _variables(pid: int) -> dict[str, str]:
    pairs = (entry.partition("=") for entry in _read(pid, "environ").split("\0"))
    return {name: value for name, _, value in pairs}


def _link(pid: int, name: str) -> Path | None:
    try:
        return (PROC / str(pid) / name).readlink()
    except OSError:
        return None


def _read(pid: int, name: str) -> str:
    try:
        return (PROC / str(pid) / name).read_bytes().decode("utf-8", errors="replace")
    except OSError:
        return ""


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
