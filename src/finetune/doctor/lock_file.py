"""dvc.lock -> whether it is whole; one that was cut while DVC wrote it -> the newest whole one.

DVC 3.67 writes dvc.lock in place (dvc/utils/serialize/_common.py), so that a kill can leave any part of it, or nothing.
A cut that still parses only lacks entries, which DVC finds again in its run cache; the others stop every DVC command.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from finetune.errors import DataError
from finetune.io import write_bytes

NAME = "dvc.lock"
# Beside DVC's own temporary files, which git ignores.
WHOLE, TORN = ".dvc/tmp/dvc.lock.whole", ".dvc/tmp/dvc.lock.torn"
MERGE_MARKS = ("<<<<<<< ", "=======", ">>>>>>> ")
GIT_TIMEOUT_S = 20


def tear(content: bytes) -> str | None:
    """What shows that this dvc.lock was not written to its end, or None; merge marks are not looked for."""
    if not content.endswith(b"\n"):
        return "it ends in the middle of a line" if content else "it is empty"
    try:
        value: Any = YAML(typ="safe").load(content.decode("utf-8"))
    except (YAMLError, UnicodeDecodeError) as fault:
        return f"it is not YAML: {str(fault).splitlines()[0]}"
    stages = value.get("stages", {}) if isinstance(value, dict) and "schema" in value else None
    if not isinstance(stages, dict):
        return "it has no schema and stages"
    broken = [name for name, stage in stages.items() if not _is_entry(stage)]
    return f"the entry of stage {broken[0]} is incomplete" if broken else None


def merge_line(content: bytes) -> int | None:
    """The number of the first line that git's merge left to be settled by a person, or None."""
    lines = content.decode("utf-8", errors="replace").splitlines()
    return next((number for number, line in enumerate(lines, 1) if line.startswith(MERGE_MARKS)), None)


def check_merge(root: Path) -> None:
    """Raise DataError where dvc.lock holds both sides of a merge: which one counts is not for a program to say."""
    path = root / NAME
    line = merge_line(path.read_bytes()) if path.is_file() else None
    if line is not None:
        raise DataError("dvc.lock has merge marks", f"{path}:{line}", "git checkout HEAD -- dvc.lock && make repro")


def remember(root: Path) -> None:
    """Keep a copy of a whole dvc.lock, to return to when a later writing of it is cut."""
    path = root / NAME
    if path.is_file():
        content = path.read_bytes()
        if tear(content) is None:
            write_bytes(root / WHOLE, content)


def mend(root: Path) -> str | None:
    """Put a whole dvc.lock in the place of a torn one; returns what was done, or None where nothing was wrong.

    The torn one is kept in `.dvc/tmp`. The newest copy is taken, else the committed one, else none: DVC then looks for
    every stage in its run cache.
    """
    path = root / NAME
    if not path.is_file():
        return None
    content = path.read_bytes()
    if _is_remembered(root, content) or (reason := tear(content)) is None:
        return None
    write_bytes(root / TORN, content)
    origin, whole = _newest_whole(root)
    if whole is None:
        path.unlink()
    else:
        write_bytes(path, whole)
    return (
        f"dvc.lock was cut while DVC wrote it ({reason}); restored from {origin}, the torn one is {TORN}: "
        "what was made since then comes from DVC's run cache, or its stage runs again"
    )


def _is_entry(stage: Any) -> bool:
    """Whether a stage has its command, each of its files a path, and each of its parameter files values."""
    if not isinstance(stage, dict) or not stage.get("cmd"):
        return False
    params = stage.get("params", {})
    if not isinstance(params, dict) or not all(isinstance(values, dict) for values in params.values()):
        return False
    files = [stage.get(key, []) for key in ("deps", "outs")]
    listed = all(isinstance(entries, list) for entries in files)
    return listed and all(isinstance(entry, dict) and "path" in entry for entries in files for entry in entries)


def _is_remembered(root: Path, content: bytes) -> bool:
    copy = root / WHOLE
    return copy.is_file() and copy.read_bytes() == content


def _newest_whole(root: Path) -> tuple[str, bytes | None]:
    copy = root / WHOLE
    if copy.is_file() and tear(copied := copy.read_bytes()) is None:
        return "the copy of the last run", copied
    command = ["git", "-C", str(root), "show", f"HEAD:./{NAME}"]
    try:
        committed = subprocess.run(command, capture_output=True, check=True, timeout=GIT_TIMEOUT_S).stdout
    except (OSError, subprocess.SubprocessError):
        return "nothing, since git has none", None
    return ("git's last commit", committed) if tear(committed) is None else ("nothing, since git's is torn too", None)
