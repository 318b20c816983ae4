"""What one check found -> a line of the table, or of the JSON, that doctor shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["ok", "warning", "fault"]
MARKS: dict[Verdict, str] = {"ok": "ok", "warning": "WARNING", "fault": "FAULT"}
GIB, MIB = 1 << 30, 1 << 20


@dataclass(frozen=True)
class Result:
    """One check. `remedy`: what to type, for everything but `ok`."""

    check: str
    found: str
    verdict: Verdict
    remedy: str | None


def ok(check: str, found: str) -> Result:
    """Nothing stands in the way."""
    return Result(check, found, "ok", None)


def warning(check: str, found: str, remedy: str) -> Result:
    """The run may go on, with less than it could have, or cannot be judged yet."""
    return Result(check, found, "warning", remedy)


def fault(check: str, found: str, remedy: str) -> Result:
    """The run would stop, or be spoilt."""
    return Result(check, found, "fault", remedy)


def worst(results: Sequence[Result]) -> Verdict:
    """The gravest verdict."""
    verdicts = {result.verdict for result in results}
    return "fault" if "fault" in verdicts else "warning" if "warning" in verdicts else "ok"


def table(results: Sequence[Result]) -> str:
    """One line for each check, its remedy below it, and the counts at the end."""
    width = max(len(result.check) for result in results)
    indent = " " * (width + 11)
    lines = []
    for result in results:
        first, *others = result.found.splitlines()
        lines.append(f"{MARKS[result.verdict]:<7}  {result.check:<{width}}  {first}")
        lines += [f"{indent}{line}" for line in others]
        if result.remedy:
            lines += [f"{indent}{'remedy: ' if not at else '        '}{line}" for at, line in _lines(result.remedy)]
    counts = {verdict: sum(result.verdict == verdict for result in results) for verdict in MARKS}
    lines.append(f"{len(results)} checks: {counts['fault']} faults, {counts['warning']} warnings")
    return "\n".join(lines) + "\n"


def as_json(results: Sequence[Result]) -> dict[str, Any]:
    """The same for machines."""
    return {"verdict": worst(results), "checks": [asdict(result) for result in results]}


def gib(size_bytes: float) -> str:
    """A size for people to read: in MiB below 1 GiB."""
    return f"{size_bytes / GIB:.1f} GiB" if size_bytes >= GIB else f"{size_bytes / MIB:.0f} MiB"


def _lines(text: str) -> list[tuple[int, str]]:
    return list(enumerate(text.splitlines()))
