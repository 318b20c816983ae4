"""The first rows of files of the Hub, as JSON lines, up to a budget: what lies behind it is not downloaded.

The Hub's own client carries session, access and errors; bytes are asked for by range and counted, so a cut connection
goes on where it broke. HfFileSystem is not used: where a server ignores a range, it takes the wrong bytes for the right
ones. `datasets` is not used: it guesses types, and one broken line ends it; here lines pass through as they are.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
import pyarrow
from pyarrow import parquet

from finetune.data.fetching.hub import HubFile, Repo, retried
from finetune.errors import DataError
from finetune.io import replacing
from finetune.log import transfer_bar
from finetune.source_sections import HubStreamOrigin

LINES, TABLES = (".jsonl", ".json", ".ndjson", ".jsonl.gz", ".json.gz", ".ndjson.gz"), (".parquet",)
# A request doubles what the one before it asked for, so that a small budget reads little and a large one asks seldom.
FIRST_REQUEST_BYTES, LARGEST_REQUEST_BYTES = 64 << 10, 8 << 20
COLUMN_BUFFER_BYTES = 1 << 20
BATCH_ROWS = 256
MAX_LINE_BYTES = 64 << 20


@dataclass(frozen=True)
class ReadFile:
    """A file that rows were read of: its path, hash and size on the Hub, and how many rows were taken."""

    path: str
    digest: str
    size_bytes: int
    rows: int


@dataclass(frozen=True)
class Streamed:
    """Budget and what was taken. `size_bytes` of the JSON lines; `complete`: the files ended before the budget did."""

    max_rows: int | None
    max_bytes: int | None
    rows: int
    size_bytes: int
    complete: bool
    files: tuple[ReadFile, ...]

    def to_row(self) -> dict[str, Any]:
        """The entry in a manifest."""
        return {**asdict(self), "files": [asdict(file) for file in self.files]}


def check_streamable(repo: Repo, files: list[HubFile]) -> None:
    """Raises DataError when a file is neither JSON lines (plain or gzip) nor Parquet."""
    if other := next((file.path for file in files if not file.path.endswith((*LINES, *TABLES))), None):
        raise DataError(
            f"{other} cannot be streamed, only {', '.join((*LINES, *TABLES))}",
            repo.where(),
            "mend `files`, or download whole files with `kind: hub`",
        )


def stream(repo: Repo, files: list[HubFile], origin: HubStreamOrigin, target: Path) -> Streamed:
    """Write the first rows of `files`, in order, to `target`, one JSON value a line, until the next would not fit.

    A file that was read to its end is checked against the Hub's hash. Memory: one request, or one Parquet batch.
    Raises DataError on a damaged file, a budget below the first row, or when the Hub cannot be reached.
    """
    read: list[ReadFile] = []
    rows = size_bytes = 0
    full = False
    bar = transfer_bar(desc=repo.repo_id, total=origin.max_bytes, unit="B", unit_scale=True)
    with replacing(target) as temporary, temporary.open("wb") as out, bar:
        for file in files:
            before = rows
            for line in _lines(repo, file):
                if origin.max_bytes is not None and size_bytes + len(line) + 1 > origin.max_bytes:
                    full = True
                    break
                out.write(line + b"\n")
                rows, size_bytes = rows + 1, size_bytes + len(line) + 1
                bar.update(len(line) + 1)
                if rows == origin.max_rows:
                    full = True
                    break
            read.append(ReadFile(file.path, file.digest, file.size_bytes, rows - before))
            if full:
                break
        if rows == 0:
            raise DataError(
                f"no row fits into max_bytes ({origin.max_bytes})" if full else "the files have no rows",
                repo.where(),
                "raise max_bytes" if full else "mend `files` in params.yaml",
            )
    return Streamed(origin.max_rows, origin.max_bytes, rows, size_bytes, not full, tuple(read))


class RemoteFile(io.RawIOBase):
    """A file of the Hub, read by ranges; counts what it asked for, and hashes what is read from the start on."""

    def __init__(self, repo: Repo, file: HubFile) -> None:
        self.repo, self.file = repo, file
        self.position = 0
        self.request_bytes = FIRST_REQUEST_BYTES
        self.ahead, self.ahead_start = b"", 0
        self.digest, self.hashed_bytes = file.hasher(), 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True: Parquet is read from its end."""
        return True

    def tell(self) -> int:
        """Position in bytes."""
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position in bytes; returns it."""
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.file.size_bytes}[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer; returns how many bytes, fewer at the end of the file only: pyarrow counts on that."""
        filled = 0
        while filled < len(buffer):
            offset = self.position - self.ahead_start
            if not 0 <= offset < len(self.ahead):
                self._read_ahead(len(buffer) - filled)
                offset = 0
            piece = self.ahead[offset : offset + len(buffer) - filled]
            if not piece:
                break
            buffer[filled : filled + len(piece)] = piece
            filled, self.position = filled + len(piece), self.position + len(piece)
        return filled

    def check(self) -> None:
        """Raises DataError when the file was read whole, in order, and is not the one that the Hub lists."""
        if self.hashed_bytes == self.file.size_bytes and self.digest.hexdigest() != self.file.digest:
            raise self.damaged(f"has hash {self.digest.hexdigest()}, the Hub says {self.file.digest}")

    def damaged(self, what: object) -> DataError:
        """The error for a file whose bytes are wrong."""
        return DataError(f"{self.file.path} {what}", self.repo.where(), "run `dvc repro fetch` again")

    def _read_ahead(self, wanted: int) -> None:
        in_order = self.position == self.ahead_start + len(self.ahead)
        self.request_bytes = min(2 * self.request_bytes, LARGEST_REQUEST_BYTES) if in_order else FIRST_REQUEST_BYTES
        end = min(self.position + max(wanted, self.request_bytes), self.file.size_bytes)
        self.ahead_start = self.position
        self.ahead = self._range(self.position, end) if end > self.position else b""
        if self.hashed_bytes == self.position:
            self.digest.update(self.ahead)
            self.hashed_bytes += len(self.ahead)

    def _range(self, start: int, end: int) -> bytes:
        """Bytes start to end (exclusive); after a cut, only those that are missing are asked for again."""
        from huggingface_hub import constants, get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, httpx

        url = hf_hub_url(self.repo.repo_id, self.file.path, repo_type=self.repo.repo_type, revision=self.repo.revision)
        got = bytearray()

        def ask() -> None:
            first = start + len(got)
            headers = {**build_hf_headers(), "Range": f"bytes={first}-{end - 1}", "Accept-Encoding": "identity"}
            timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
            with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
                hf_raise_for_status(response)
                expected = f"bytes {first}-{end - 1}/{self.file.size_bytes}"
                if response.status_code != 206 or response.headers.get("Content-Range") != expected:
                    raise self.damaged(f"was not sent by range (asked for {expected})")
                for chunk in response.iter_raw():
                    got.extend(chunk)
            if len(got) != end - start:
                raise httpx.RemoteProtocolError(f"{len(got)} bytes instead of {end - start}")

        retried(ask, self.repo)
        return bytes(got)


def _lines(repo: Repo, file: HubFile) -> Iterator[bytes]:
    """The rows of a file as JSON lines without their newline."""
    remote = RemoteFile(repo, file)
    try:
        if file.path.endswith(TABLES):
            yield from _table_rows(remote)
            return
        buffered: Any = io.BufferedReader(remote, FIRST_REQUEST_BYTES)
        yield from _text_lines(remote, gzip.GzipFile(fileobj=buffered) if file.path.endswith(".gz") else buffered)
    except (OSError, EOFError, zlib.error, pyarrow.ArrowInvalid) as fault:
        # OSError: gzip's word for a wrong checksum, and pyarrow's for a page that it cannot decode.
        raise remote.damaged(f"is damaged: {fault}") from None


def _text_lines(remote: RemoteFile, handle: Any) -> Iterator[bytes]:
    first = True
    while line := handle.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES or (first and line.lstrip().startswith(b"[")):
            what = f"it is a list, or has a line of more than {MAX_LINE_BYTES} bytes"
            raise DataError(
                f"{remote.file.path} is not JSON lines: {what}", remote.repo.where(), "use `kind: hub` for this source"
            )
        if line.strip():
            first = False
            yield line.rstrip(b"\r\n")
    remote.check()


def _table_rows(remote: RemoteFile) -> Iterator[bytes]:
    table = parquet.ParquetFile(remote, buffer_size=COLUMN_BUFFER_BYTES, pre_buffer=False)
    for batch in table.iter_batches(BATCH_ROWS, use_threads=False):
        for row in batch.to_pylist():
            try:
                yield orjson.dumps(row, option=orjson.OPT_SORT_KEYS)
            except TypeError as fault:
                raise remote.damaged(f"has a column that JSON cannot hold: {fault}") from None
