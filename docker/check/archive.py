"""A saved image -> its layers by size, its configuration, and whether bytes that must not be in it are."""

from __future__ import annotations

import gzip
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

CHUNK_BYTES = 1 << 22
# buildah writes `COPY dir:<hash> in /opt/venv`.
SHOWN_HASH = re.compile(r"^/bin/sh -c #\(nop\) |\b(file|dir|multi):[0-9a-f]{64} ")
GZIP = b"\x1f\x8b"


def read_image(archive: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The configuration file of a `docker save` archive, and `{size_bytes, made_by}` of each layer, base first."""
    with tarfile.open(archive) as tar:
        (manifest,) = _json(tar, "manifest.json")
        image = _json(tar, manifest["Config"])
        made = [entry.get("created_by", "") for entry in image["history"] if not entry.get("empty_layer")]
        sizes = [_size(tar, name) for name in manifest["Layers"]]
    commands = [*made, *[""] * (len(sizes) - len(made))]
    layers = [
        {"made_by": SHOWN_HASH.sub("", " ".join(command.split()))[:160], "size_bytes": size}
        for command, size in zip(commands, sizes, strict=True)
    ]
    return image, layers


def holding(archive: Path, needles: Sequence[bytes]) -> dict[bytes, list[str]]:
    """Each needle -> the members of the archive, layers and configuration, that hold its bytes."""
    found: dict[bytes, list[str]] = {needle: [] for needle in needles}
    for name, stream in _members(archive):
        for needle in _in(stream, needles):
            found[needle].append(name)
    return found


def _json(tar: tarfile.TarFile, name: str) -> Any:
    member = tar.extractfile(name)
    if member is None:
        raise tarfile.TarError(f"{name} is no file")
    return json.load(member)


def _size(tar: tarfile.TarFile, name: str) -> int:
    """Bytes of a layer unpacked."""
    member = tar.extractfile(name)
    if member is None:
        raise tarfile.TarError(f"{name} is no file")
    return sum(len(chunk) for chunk in _chunks(_unpacked(member)))


def _unpacked(stream: IO[bytes]) -> IO[bytes]:
    head = stream.read(len(GZIP))
    stream.seek(0)
    return gzip.GzipFile(fileobj=stream) if head == GZIP else stream  # type: ignore[return-value]


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    with tarfile.open(archive) as tar:
        for member in tar:
            stream = tar.extractfile(member) if member.isreg() else None
            if stream is not None:
                yield member.name, _unpacked(stream)


def _chunks(stream: IO[bytes]) -> Iterator[bytes]:
    while chunk := stream.read(CHUNK_BYTES):
        yield chunk


def _in(stream: IO[bytes], needles: Sequence[bytes]) -> set[bytes]:
    seen, tail, longest = set(), b"", max(map(len, needles))
    for chunk in _chunks(stream):
        seen |= {needle for needle in needles if needle in tail + chunk}
        tail = chunk[-longest:]
    return seen
