"""Checkpoints that can be trusted after a crash: keyed by all that determines the run, sealed by SHA-256.

They live outside DVC's outs (DVC deletes outs before a stage), under `.cache/checkpoints/<key>/`. A checkpoint is
written beside its place, each file flushed to disk, then a manifest with the SHA-256 of every file, and renamed at
last: a folder named `checkpoint-N` is whole, or was damaged later, which its manifest shows.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from finetune.errors import DataError
from finetune.io import sha256_file, sha256_text, write_json
from finetune.log import logger

MANIFEST, FINISHED, TENSORS = "manifest.json", "finished.json", "tensors-{:05d}.safetensors"
MAX_FILE_BYTES = 4 << 30


def run_key(determinants: Mapping[str, Any]) -> str:
    """Hash of everything that determines a run: a changed parameter, input or library never resumes another's state."""
    return sha256_text(json.dumps(determinants, sort_keys=True))[:16]


def save(folder: Path, step: int, tensors: Mapping[str, torch.Tensor], content: Mapping[str, Any]) -> Path:
    """Write `checkpoint-<step>` below `folder`, whole or not at all; returns its path.

    `tensors` must lie on the CPU. Raises DataError when the disk is full; nothing is left behind then.
    """
    partial, target = folder / f".checkpoint-{step}.partial", folder / f"checkpoint-{step}"
    _remove(partial)
    try:
        partial.mkdir(parents=True)
        for number, part in enumerate(_parts(tensors), 1):
            save_file(part, partial / TENSORS.format(number))
        for name, value in content.items():
            write_json(partial / f"{name}.json", value)
        _seal(partial)
    except (OSError, SafetensorError) as fault:
        _remove(partial)
        raise DataError(
            f"the checkpoint of step {step} could not be written ({fault})",
            folder,
            "free some space or lower train_qlora.keep_checkpoints, then `dvc repro`, which goes on from the last one",
        ) from fault
    _remove(target)
    partial.rename(target)
    _sync(folder)
    return target


def load_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint that `is_intact`, by name."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def is_intact(checkpoint: Path) -> bool:
    """Whether a checkpoint holds exactly the bytes that were written."""
    try:
        sealed = json.loads((checkpoint / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST]
    return bool(sealed == {path.name: sha256_file(path) for path in files})


def newest_intact(folder: Path) -> Path | None:
    """The intact checkpoint of the highest step below `folder`, or None; damaged ones are named in the log."""
    for checkpoint in all_checkpoints(folder):
        if is_intact(checkpoint):
            return checkpoint
        logger.warning("%s is incomplete or damaged: passed over", checkpoint.name)
    return None


def all_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints below `folder`, newest first, by step: clocks may jump."""
    return sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, once the newest is read back and found intact."""
    newest, *older = all_checkpoints(folder)
    if not is_intact(newest):
        raise DataError(
            f"{newest.name} does not hold what was written to it",
            newest,
            "check the disk; `dvc repro` goes on from the checkpoint before it",
        )
    for checkpoint in older[keep - 1 :]:
        _remove(checkpoint)


def drop_before(folder: Path, step: int) -> None:
    """Remove the checkpoints of steps before `step`."""
    for checkpoint in all_checkpoints(folder):
        if step_of(checkpoint) < step:
            _remove(checkpoint)


def finish(folder: Path) -> None:
    """Note that a run has ended, and keep its last checkpoint only.

    It stays until another run begins: a kill between the end of a stage and DVC's record of it costs no training then.
    """
    prune(folder, keep=1)
    write_json(folder / FINISHED, True)


def remove_finished(runs: Path, but: str) -> None:
    """Remove the runs below `runs` that have ended, except the one named `but`.

    A kill on the way leaves the whole of a run or nothing under its name: a checkpoint without the log of the steps
    before it would be resumed from, and they would be missing from the log.
    """
    for left in sorted(runs.glob(".*.dropped")):
        shutil.rmtree(left)
    for mark in sorted(runs.glob(f"*/{FINISHED}")):
        if mark.parent.name != but:
            _remove(mark.parent)


def begin(folder: Path) -> None:
    """Take back that a run has ended: what is forced to run again must not be removed while it does."""
    (folder / FINISHED).unlink(missing_ok=True)


def tidy(folder: Path) -> None:
    """Remove what a killed run left half written or half removed."""
    for left in folder.glob(".checkpoint-*"):
        shutil.rmtree(left)


def _remove(folder: Path) -> None:
    # Renamed first: a kill in the middle must not leave a checkpoint with some of its files.
    if folder.exists():
        dropped = folder.with_name(f".{folder.name.lstrip('.')}.dropped")
        shutil.rmtree(dropped, ignore_errors=True)
        folder.rename(dropped)
        shutil.rmtree(dropped)


def _parts(tensors: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    part: dict[str, torch.Tensor] = {}
    size_bytes = 0
    for name, tensor in sorted(tensors.items()):
        if part and size_bytes + tensor.nbytes > MAX_FILE_BYTES:
            yield part
            part, size_bytes = {}, 0
        part[name] = tensor
        size_bytes += tensor.nbytes
    yield part


def _seal(folder: Path) -> None:
    hashes = {}
    for file in sorted(folder.iterdir()):
        _sync(file)
        hashes[file.name] = sha256_file(file)
    write_json(folder / MANIFEST, hashes)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
