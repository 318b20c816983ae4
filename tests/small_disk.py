"""A file system of a given size for one process, in memory; needs Linux that lets a user have namespaces."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path


def in_small_disk(folder: Path, size_bytes: int, command: Sequence[str]) -> list[str]:
    """The command line that runs `command` with `folder` on a disk of its own, which ends with it.

    Others see what is in it below `/proc/PID/root`, while it runs.
    """
    mount = f'mount -t tmpfs -o size={size_bytes} none "$1" && shift && exec "$@"'
    return ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh", str(folder), *command]


@cache
def no_small_disks() -> str:
    """Why there are none here; empty where there are."""
    try:
        done = subprocess.run(
            in_small_disk(Path("/tmp"), 1 << 16, ["true"]),  # noqa: S108
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return "no program `unshare`"
    return f"no file system of one's own: {done.stderr.strip()}" if done.returncode else ""
