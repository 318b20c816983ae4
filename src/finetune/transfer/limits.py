"""How much a transfer may write, whether the disk has room for it, and the bar that shows how far it is."""

from __future__ import annotations

import resource
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.errors import DataError
from finetune.lineage import MIB
from finetune.log import transfer_bar

LOOK_S = 0.2
# Modelfile, template and the folder's own entry; a disk filled to the last byte stops other programs too.
ROOM_BYTES = 64 << 20


@contextmanager
def largest_file(max_bytes: int) -> Iterator[None]:
    """Let this process write no file beyond `max_bytes`: a server may send more than it announced."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def require_room(folder: Path, size_bytes: int) -> None:
    """Raise DataError unless the disk of `folder` has room for so many bytes."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < size_bytes + ROOM_BYTES:
        needed, free = (f"{number / MIB:,.0f} MiB" for number in (size_bytes + ROOM_BYTES, free_bytes))
        remedy = "free some space, or take another disk: make pull NAME=... TO=/other/disk/folder"
        raise DataError(f"{needed} are needed, {free} are free", folder, remedy)


@contextmanager
def shown_growth(folder: Path, size_bytes: int, label: str) -> Iterator[None]:
    """Show how the files below `folder` grow by `size_bytes`, with rate and remaining time."""
    ended = threading.Event()
    before = _size(folder)
    with transfer_bar(total=size_bytes, unit="B", unit_scale=True, unit_divisor=1024, desc=label) as bar:

        def follow() -> None:
            while not ended.wait(LOOK_S):
                bar.update(_size(folder) - before - bar.n)

        watcher = threading.Thread(target=follow, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
            bar.update(_size(folder) - before - bar.n)


def _size(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except FileNotFoundError:
            # Renamed between the two looks; the next one sees it.
            continue
    return total
