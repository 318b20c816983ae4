"""The sources of params.yaml -> their files below data/raw, and a manifest of every byte."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from finetune.errors import DataError
from finetune.io import read_json, sha256_file
from finetune.source_sections import LocalOrigin, Source

MANIFEST = "manifest.json"
# Where DVC keeps what it tracks, and links to: .dvc/cache/files/md5/00/11223344556677889900aabbccddee.
DVC_CACHE = re.compile(r"/files/md5/[0-9a-f]{2}/[0-9a-f]{30}$")


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
    """Files that match, sorted by path; raises DataError when there are none, one is empty or its name is not UTF-8."""
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
        _check_name(path.relative_to(local_dir))
        _check_link(path, local_dir)
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


def manifest_entry(source: Source, files: list[RawFile], streamed: dict[str, Any] | None) -> dict[str, Any]:
    """What manifest.json says about one source; `revision` is null for local files, `streamed` for whole files."""
    origin = source.origin
    if isinstance(origin, LocalOrigin):
        place, revision = origin.files, None
    else:
        place, revision = f"{origin.repo_id}/{origin.files}", origin.revision
    return {
        "name": source.name,
        "use": source.use,
        "format": source.format,
        "license": source.license,
        "origin": f"{origin.kind}:{place}",
        "revision": revision,
        "files": [file.to_row() for file in sorted(files, key=lambda file: file.path)],
        "streamed": streamed,
    }


def sizes(entries: list[dict[str, Any]], base: dict[str, Any]) -> dict[str, Any]:
    """The figures of metrics/fetch.json, from the two manifests."""
    size_bytes = {entry["name"]: sum(file["size_bytes"] for file in entry["files"]) for entry in entries}
    base_files = base.get("files", [])
    return {
        "sources": len(entries),
        "files": sum(len(entry["files"]) for entry in entries),
        "size_bytes": sum(size_bytes.values()),
        "size_bytes_by_source": size_bytes,
        "base_files": len(base_files),
        "base_size_bytes": sum(file["size_bytes"] for file in base_files),
    }


def manifest_files(raw: Path, source: str) -> list[RawFile]:
    """A source's files in the manifest's order; raises DataError for a source that it does not name."""
    entries = {entry["name"]: entry for entry in read_json(raw / MANIFEST)["sources"]}
    if source not in entries:
        raise DataError(f"source {source} is not in the manifest", raw / MANIFEST, "run `dvc repro fetch`")
    return [RawFile(**file) for file in entries[source]["files"]]


def verified_files(raw: Path, source: str) -> list[RawFile]:
    """A source's files, paths relative to `raw`, in the manifest's order; raises DataError on a changed file."""
    files = manifest_files(raw, source)
    for file in files:
        verify(raw, file)
    return files


def verify(raw: Path, file: RawFile) -> None:
    """Raise DataError where a file below `raw` is missing or is not the manifest's."""
    _check(raw / file.path, file)


def _check_name(path: PurePath) -> None:
    """The manifest holds the name, and its text is UTF-8, in which a file system need not spell names."""
    try:
        path.as_posix().encode("utf-8")
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        raise DataError("the name of the file is not UTF-8", shown, "rename the file, then run `dvc repro`") from None


def _check_link(path: Path, local_dir: Path) -> None:
    """An archive of somebody else's may hold a link to a file of yours, whose text would be trained on."""
    target = path.resolve()
    if not target.is_relative_to(local_dir.resolve()) and DVC_CACHE.search(target.as_posix()) is None:
        raise DataError(
            f"a link leads out of {local_dir}, to {target}",
            path,
            "put the file itself there, or set fetch.local_dir to the folder that holds it",
        )


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
