"""Checkpoints that can be trusted after a crash: keyed by all that determines the run, sealed by SHA-256.

They live outside DVC's outs (DVC deletes outs before a stage), under `.cache/checkpoints/<key>/`. A checkpoint counts
only once `manifest.json` lies in it with the hash of each of its files; a torn one is passed over, never loaded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.io import read_json, sha256_file, sha256_text, write_json
from finetune.log import logger

MANIFEST = "manifest.json"


def run_key(determinants: Mapping[str, Any]) -> str:
    """Hash of everything that determines a run: a changed parameter, input or library never resumes another's state."""
    return sha256_text(json.dumps(determinants, sort_keys=True))[:16]


def seal(checkpoint: Path) -> None:
    """Flush every file of a finished checkpoint to disk, then write its manifest."""
    hashes = {}
    for file in _files(checkpoint):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        hashes[file.relative_to(checkpoint).as_posix()] = sha256_file(file)
    write_json(checkpoint / MANIFEST, hashes)


def is_intact(checkpoint: Path) -> bool:
    """Whether a checkpoint is sealed and holds exactly the bytes that were sealed."""
    if not (checkpoint / MANIFEST).is_file():
        return False
    sealed: dict[str, str] = read_json(checkpoint / MANIFEST)
    return sealed == {file.relative_to(checkpoint).as_posix(): sha256_file(file) for file in _files(checkpoint)}


def newest_intact(folder: Path) -> Path | None:
    """The intact checkpoint of the highest step below `folder`, or None; damaged ones are named in the log."""
    steps = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for checkpoint in steps:
        if is_intact(checkpoint):
            return checkpoint
        logger.info("%s is incomplete or damaged: passed over", checkpoint.name)
    return None


def _files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST)
