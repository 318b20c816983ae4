"""/proc/meminfo -> how much memory new work can take."""

from __future__ import annotations

from pathlib import Path


def free_memory_bytes() -> int:
    """Memory that new work can take without swapping (MemAvailable)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024
