"""A folder that a pull made -> replaced whole by the next one, or left as it is; nobody else's folder is touched."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.doctor.locks import try_lock
from finetune.errors import DataError
from finetune.io import sha256_file, write_json
from finetune.log import logger
from finetune.transfer.hashes import GGUF_NAME, MODELFILE, TEMPLATE

# By this file a folder is known as one that a pull made. It says which version lies there, and the hashes of all of
# the version's GGUF files, of which one lies beside it.
RECORD = "pulled.json"


@contextmanager
def placing(target: Path) -> Iterator[Path]:
    """Yield a new folder; when the block ends it takes the place of `target`, unless that has the same content.

    When the block raises, `target` stays as it was. Raises DataError where it is no folder of a pull, or where another
    pull is at work on it.
    """
    old, partial = (target.with_name(f".{target.name}.{suffix}") for suffix in ("replaced", "partial"))
    if old.is_dir() and not target.exists():
        # A kill between the two renames below.
        old.rename(target)
    _require_own(target)
    partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        if not try_lock(descriptor):
            raise DataError("another pull is at work", partial, "wait for it, or name another folder: TO=folder")
        try:
            _empty(partial)
            yield partial
            if _same(partial, target):
                logger.info("%s is there already and verifies: left as it is", target)
            else:
                if target.exists():
                    target.rename(old)
                partial.rename(target)
                shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(descriptor)


def write_record(folder: Path, *, model: str, version: str, hashes: Mapping[str, str]) -> None:
    """Note which version lies in the folder, and the SHA-256 of each of its GGUF files by name."""
    write_json(folder / RECORD, {"model": model, "version": version, "gguf_sha256": dict(hashes)})


def recorded_hashes(folder: Path) -> Any:
    """What `write_record` noted as hashes, not proven; None where there is no readable record."""
    try:
        return json.loads((folder / RECORD).read_bytes())["gguf_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def reuse(target: Path, partial: Path, name: str, sha256: str) -> bool:
    """Give `partial` the file `name` of `target` if it is there with this hash; returns whether it was."""
    known = target / name
    if not known.is_file() or known.is_symlink() or sha256_file(known) != sha256:
        return False
    try:
        (partial / name).hardlink_to(known)
    except OSError:
        # Some network file systems have no hard links.
        shutil.copyfile(known, partial / name)
    return True


def _require_own(target: Path) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise DataError("not a folder", target, "name a new folder: make pull NAME=... TO=folder")
    names = sorted(entry.name for entry in target.iterdir()) if target.exists() else []
    foreign = [name for name in names if name not in (RECORD, MODELFILE, TEMPLATE) and not GGUF_NAME.fullmatch(name)]
    if foreign or (names and RECORD not in names):
        what = f"the folder holds {', '.join((foreign or names)[:5])}, and a pull replaces the whole of it"
        raise DataError(what, target, "name a new folder: make pull NAME=... TO=folder")


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _same(partial: Path, target: Path) -> bool:
    ours = sorted(file.name for file in partial.iterdir())
    if not target.is_dir() or ours != sorted(file.name for file in target.iterdir()):
        return False
    pairs = [(partial / name, target / name) for name in ours]
    return all(left.samefile(right) or sha256_file(left) == sha256_file(right) for left, right in pairs)
