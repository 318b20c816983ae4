"""Files read and written whole: atomic replacement, sorted keys, SHA-256; never a time or a path inside."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from finetune.errors import DataError

CHUNK_BYTES = 1 << 20


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on success it is fsynced and renamed over `target`, else removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.partial")
    try:
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def fresh_folder(folder: Path) -> None:
    """Make `folder` new and empty: a file of an earlier run must not become part of this run's output."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def write_bytes(target: Path, content: bytes) -> None:
    """Replace `target` by `content`, whole or not at all."""
    with replacing(target) as temporary:
        temporary.write_bytes(content)


def write_text(target: Path, content: str) -> None:
    """Replace `target` by `content` as UTF-8 with its newlines as given."""
    write_bytes(target, content.encode("utf-8"))


def write_json(target: Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys and a final newline."""
    write_text(target, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read one JSON value; raises DataError when the file is missing or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError("file is missing", path, "run `dvc repro`, which makes it") from None
    except json.JSONDecodeError as fault:
        raise DataError(f"not valid JSON: {fault}", path, "delete the file and run `dvc repro`") from None


def write_jsonl(target: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write one JSON object per line, keys sorted; returns the number of rows."""
    count = 0
    with replacing(target) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as handle:
        for row in rows:
            handle.write(json.dumps(row, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON-lines file that this project wrote; raises DataError naming file and line."""
    if not path.is_file():
        raise DataError("file is missing", path, "run `dvc repro`, which makes it")
    with path.open(encoding="utf-8") as handle:
        for number, line in enumerate(handle, 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as fault:
                raise DataError(f"not valid JSON: {fault}", f"{path}:{number}", "run `dvc repro` again") from None


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """The rows of a Parquet file as dictionaries; raises DataError when the file is missing or damaged."""
    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except FileNotFoundError:
        raise DataError("file is missing", path, "run `dvc repro`, which makes it") from None
    except pyarrow.ArrowInvalid as fault:
        raise DataError(f"not a Parquet file: {fault}", path, "delete the file and run `dvc repro`") from None
    return rows


def write_csv(target: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV with a header, for a DVC plot."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_text(target, text.getvalue())


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV with a header, such as a DVC plot; raises DataError when the file is missing."""
    try:
        with path.open(encoding="utf-8", newline="") as handle:
            return list(csv.DictReader(handle))
    except FileNotFoundError:
        raise DataError("file is missing", path, "run `dvc repro`, which makes it") from None


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_text(text: str) -> str:
    """SHA-256 of a text's UTF-8 bytes, in hex."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sha256_tree(path: Path) -> str:
    """SHA-256 over a file, or over the sorted relative names and contents of a folder's files."""
    if path.is_file():
        return sha256_file(path)
    if not path.is_dir():
        raise DataError("file or folder is missing", path, "run `dvc repro`, which makes it")
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()
