"""What this process does to a folder, counted; and a death at one of these events, by kill -9 or with the power.

An event is anything after which the folder differs, or may differ after a crash: a file opened for writing, written,
flushed to the disk, renamed or removed, a folder made or removed. They are seen through Python's audit events
(https://docs.python.org/3/library/audit_events.html), and through the three functions that those leave out.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft.peft_model
from safetensors.torch import save_file

from finetune.training import checkpoint

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def die() -> None:
    """`kill -9` of this process."""
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class DiskEvents:
    """`seen`: the events below `folders`, since `count` was called. At event number `fatal`, from 0, the process dies.

    It dies before the event; in the middle of it, with half of the bytes on the disk, where bytes are written. With
    `power_fails`, only half stays of what was written and not yet flushed to the disk. `flushed_bytes`: of each file
    that was opened for writing, how much of it was flushed.
    """

    folders: tuple[Path, ...]
    fatal: int | None = None
    power_fails: bool = False
    counting: bool = False
    seen: list[str] = field(default_factory=list)
    flushed_bytes: dict[Path, int] = field(default_factory=dict)

    def count(self) -> None:
        """Count from here on."""
        self.counting = True
        self.seen.clear()

    def note(self, what: str, *paths: Path, halve: Callable[[], Any] | None = None) -> None:
        """Note an event, and die of it if it is the fatal one; `halve` does the half of it."""
        if not self.counting or not self.place(paths[0]):
            return
        if len(self.seen) == self.fatal:
            if halve is not None:
                halve()
            if self.power_fails:
                for path, flushed in self.flushed_bytes.items():
                    halve_from(flushed, path)
            die()
        self.seen.append(" ".join([what, *map(self.place, paths)]))

    def place(self, path: Path) -> str:
        """The path relative to the folder that it is in; empty outside of them."""
        return next((str(path.relative_to(each)) for each in self.folders if path.is_relative_to(each)), "")

    def watch(self) -> None:
        """See the events of this process from now on; there is no way back."""
        sys.addaudithook(self._audit)
        fsync, write_bytes = os.fsync, Path.write_bytes

        def flush(handle: int) -> None:
            path = Path(f"/proc/self/fd/{handle}").readlink()
            if path.suffix == ".jsonl":
                # Lines are added to this file, and stand in it before they are flushed.
                self.note("write", path, halve=lambda: halve_from(self.flushed_bytes[path], path))
            self.note("flush", path)
            fsync(handle)
            if path.is_file():
                self.flushed_bytes[path] = path.stat().st_size

        def write(path: Path, content: bytes) -> int:
            self.note("write", path, halve=lambda: write_bytes(path, content[: len(content) // 2]))
            return write_bytes(path, content)

        def write_tensors(tensors: dict[str, Any], target: str | Path, metadata: Any = None) -> None:
            path = Path(target)

            def halve() -> None:
                save_file(tensors, path, metadata)
                halve_from(0, path)

            self.note("write", path, halve=halve)
            save_file(tensors, path, metadata)
            self.flushed_bytes[path] = 0

        os.fsync, Path.write_bytes = flush, write  # type: ignore[assignment,method-assign]
        checkpoint.save_file = write_tensors  # type: ignore[attr-defined]
        peft.peft_model.safe_save_file = write_tensors

    def _audit(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "open":
            path, _, flags = arguments
            if flags & WRITING and not isinstance(path, int):
                self.note("open", absolute(path))
                if flags & os.O_ACCMODE:
                    size_bytes = (
                        0 if flags & os.O_TRUNC or not absolute(path).exists() else absolute(path).stat().st_size
                    )
                    self.flushed_bytes[absolute(path)] = size_bytes
        elif name == "os.rename":
            source, target = absolute(arguments[0], arguments[2]), absolute(arguments[1], arguments[3])
            self.note("rename", source, target)
            self.flushed_bytes = {moved(path, source, target): size for path, size in self.flushed_bytes.items()}
        elif name in ("os.mkdir", "os.remove", "os.rmdir"):
            path = absolute(arguments[0], arguments[-1])
            # These are tried without looking first, and then nothing happens.
            if path.exists() != (name == "os.mkdir"):
                self.note(name.removeprefix("os."), path)
            self.flushed_bytes.pop(path, None)


def absolute(path: Any, folder: int = -1) -> Path:
    """A path as Python's audit events name it: relative to an open folder, or to the working one."""
    start = Path(f"/proc/self/fd/{folder}").readlink() if folder >= 0 else Path.cwd()
    return start / os.fsdecode(path)


def moved(path: Path, source: Path, target: Path) -> Path:
    """Where `path` is after `source` became `target`."""
    return target / path.relative_to(source) if path.is_relative_to(source) else path


def halve_from(kept_bytes: int, path: Path) -> None:
    """Leave the first `kept_bytes` of a file and half of what is behind them, if it exists."""
    if path.is_file():
        os.truncate(path, (kept_bytes + path.stat().st_size) // 2)


def copy_of(folder: Path, target: Path) -> None:
    """Copy a folder as it is now."""
    if folder.exists():
        shutil.copytree(folder, target, symlinks=True)
