"""a file of JSON lines that grows -> the points that a curve still lacks, each with its own time and step."""

from __future__ import annotations

import json
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from finetune.telemetry import LABELS

Point = tuple[str, float, int, int]


class Tail:
    """The lines of `path` from the first that was not accepted; the file is the queue, nothing waits in memory.

    A file that was cut or replaced before that place begins anew: its points carry their own times, and MLflow takes
    one that it has for the same one.
    """

    def __init__(self, path: Path, prefix: str = "") -> None:
        self.path, self.prefix = path, prefix
        self._offset, self._last = 0, b""

    def unread(self, most: int) -> list[bytes]:
        """At most so many whole lines, none where the file is missing; a last line still being written is left out."""
        try:
            handle = self.path.open("rb")
        except FileNotFoundError:
            return []
        with handle:
            handle.seek(self._offset - len(self._last))
            if handle.read(len(self._last)) != self._last:
                self._offset, self._last = 0, b""
                handle.seek(0)
            return [line for line in islice(handle, most) if line.endswith(b"\n")]

    def accept(self, lines: list[bytes]) -> None:
        """Go on behind these lines of `unread`."""
        self._offset += sum(map(len, lines))
        self._last = lines[-1]

    def points(self, lines: list[bytes]) -> list[Point]:
        """(name, value, Unix time in ms, step) of every number of `lines`, in their order; a torn line has none."""
        found: list[Point] = []
        for line in lines:
            with suppress(json.JSONDecodeError, UnicodeDecodeError):
                found += _points(json.loads(line), self.prefix)
        return found


def _points(entry: dict[str, Any], prefix: str) -> list[Point]:
    time_ms, step = round(entry["time_s"] * 1000), int(entry["step"])
    figures = ((name, value) for name, value in sorted(entry.items()) if name not in LABELS)
    return [(prefix + name, float(value), time_ms, step) for name, value in figures if type(value) in (int, float)]
