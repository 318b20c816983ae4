"""The sources of params.yaml -> their files below data/raw, and a manifest of every byte."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from finetune.data_sections import ChatSource, CsvSource, HubOrigin
from finetune.errors import DataError
from finetune.io import read_json, sha256_file

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class RawFile:
    """One file: path relative to the folder that its manifest describes, SHA-256 in hex, size in bytes."""

    path: str
    sha256: str
    size_bytes: int

    def to_row(self) -> dict[str, Any]:
        """The entry in a manifest."""
        return asdict(self)


def local_files(local_dir: Path, pattern: str, source: str) -> list[Path]:
    """Files that match, sorted by path; raises DataError when there are none, or one is empty."""
    if PurePosixPath(pattern).is_absolute() or ".." in PurePosixPath(pattern).parts:
        raise DataError(f"{pattern!r} leaves {local_dir}", f"fetch.sources, {source}", "give a glob below that folder")
    found = sorted(path for path in local_dir.glob(pattern) if path.is_file())
    if not found:
        raise DataError(
            f"no file matches {pattern!r} below {local_dir}",
            f"fetch.sources, {source}",
            f"put the file there, or mend fetch.local_dir or the origin of {source} in params.yaml",
        )
    for path in found:
        if path.stat().st_size == 0:
            raise DataError("file is empty", path, f"give source {source} a file with rows, then run `dvc repro`")
    return found


def copy_verified(origin: Path, raw: Path, path: str) -> RawFile:
    """Copy a file to `raw/path`; raises DataError when the copy differs from what was read."""
    target = raw / path
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(origin, target)
    file = RawFile(path, sha256_file(origin), origin.stat().st_size)
    _check(target, file)
    return file


def manifest_entry(source: ChatSource | CsvSource, files: list[RawFile]) -> dict[str, Any]:
    """What manifest.json says about one source; `revision` is null for local files."""
    origin = source.origin
    return {
        "name": source.name,
        "format": source.format,
        "license": source.license,
        "origin": f"hub:{origin.repo_id}/{origin.files}" if isinstance(origin, HubOrigin) else f"local:{origin.files}",
        "revision": origin.revision if isinstance(origin, HubOrigin) else None,
        "files": [file.to_row() for file in sorted(files, key=lambda file: file.path)],
    }


def verified_files(raw: Path, source: str) -> list[str]:
    """Paths of a source's files relative to `raw`, in the manifest's order; raises DataError on a changed file."""
    entries = {entry["name"]: entry for entry in read_json(raw / MANIFEST)["sources"]}
    if source not in entries:
        raise DataError(f"source {source} is not in the manifest", raw / MANIFEST, "run `dvc repro fetch`")
    files = [RawFile(**file) for file in entries[source]["files"]]
    for file in files:
        _check(raw / file.path, file)
    return [file.path for file in files]


def _check(path: Path, expected: RawFile) -> None:
    if not path.is_file():
        raise DataError("file is missing", path, "run `dvc repro --force fetch`")
    seen = RawFile(expected.path, sha256_file(path), path.stat().st_size)
    if seen != expected:
        raise DataError(
            f"file has {seen.size_bytes} bytes and SHA-256 {seen.sha256}, "
            f"expected {expected.size_bytes} and {expected.sha256}",
            path,
            "run `dvc repro --force fetch`",
        )
