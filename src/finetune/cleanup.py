"""What a repository holds that nothing names any more -> a list with sizes; `--delete` removes it, only here.

    python -m finetune.cleanup [--delete]

DVC's cache keeps what the workspace, any commit of any branch or tag, or any experiment names; a remote is never
touched. A training that was stopped can go on, and a work tree that was kept was kept on purpose: they are only shown.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.doctor.locks import sole_run
from finetune.errors import DataError, FinetuneError
from finetune.git_history import LOCK, is_shallow, md5_of_folder
from finetune.io import sha256_tree
from finetune.lineage import MIB, repository_root
from finetune.log import logger, setup_logging
from finetune.reproduction import read_stages

KEPT = ("--workspace", "--all-commits", "--all-experiments")
WOULD_REMOVE = re.compile(r"^Removing (.+)$", re.MULTILINE)
ROWS, CHECKPOINTS, REBUILDS = Path(".cache/rows"), Path(".cache/checkpoints"), Path(".cache/rebuild")
FINISHED, SPLIT, ADAPTER, TRAINING = "finished.json", Path("data/split"), Path("models/adapter"), "train_qlora"


@dataclass(frozen=True)
class Leftover:
    """Files or folders that may go, or (not `deletable`) that only a person can judge; `size_bytes` of all of them."""

    what: str
    paths: tuple[Path, ...]
    size_bytes: int
    deletable: bool


def find_leftovers(root: Path) -> list[Leftover]:
    """Everything below `root` that nothing names; raises DataError where DVC or git cannot tell."""
    objects = unused_objects(root)
    found = [Leftover("objects of DVC's cache that no commit and no experiment names", objects, _size(objects), True)]
    current = sha256_tree(root / SPLIT)[:16] if (root / SPLIT).is_dir() else ""
    rows = tuple(path for path in _entries(root / ROWS) if path.name != current)
    found.append(Leftover("rows of killed trainings whose data has changed since", rows, _size(rows), True))
    recorded = _adapter_is_recorded(root)
    for run in _entries(root / CHECKPOINTS):
        if run.name.startswith("."):
            found.append(Leftover("half removed checkpoints", (run,), _size((run,)), True))
        elif not (run / FINISHED).is_file():
            found.append(
                Leftover(f"checkpoints of a stopped training, {_last_step(run)}", (run,), _size((run,)), False)
            )
        else:
            what = "checkpoint of a finished training" + ("" if recorded else ", which DVC has not recorded yet")
            found.append(Leftover(what, (run,), _size((run,)), recorded))
    trees = _entries(root / REBUILDS)
    found += [Leftover("work tree of a rebuild", (tree,), _size((tree,)), False) for tree in trees]
    return [leftover for leftover in found if leftover.paths]


def unused_objects(root: Path) -> tuple[Path, ...]:
    """The objects of DVC's cache that `dvc gc` would remove."""
    if is_shallow(root):
        what = "this is a shallow clone: the commits that it lacks may name what lies in the cache"
        raise DataError(what, root, "git fetch --unshallow, then: make gc")
    listed = _dvc_gc(root, "--dry")
    paths = (Path(name) for name in WOULD_REMOVE.findall(listed))
    return tuple(sorted(path for path in paths if path.exists()))


def delete(root: Path, leftovers: Sequence[Leftover]) -> int:
    """Remove what is deletable, with no run at work beside; returns how many bytes that was."""
    with sole_run(root):
        _dvc_gc(root, "--force")
        removed = [leftover for leftover in leftovers if leftover.deletable]
        for path in (path for leftover in removed for path in leftover.paths):
            if path.is_dir():
                shutil.rmtree(path)
    return sum(leftover.size_bytes for leftover in removed)


def describe(leftovers: Sequence[Leftover]) -> str:
    """One line for each, with its size, and where it lies."""
    lines = []
    for leftover in leftovers:
        verdict = "can go" if leftover.deletable else "stays "
        places = str(leftover.paths[0]) if len(leftover.paths) == 1 else f"{len(leftover.paths)} files"
        lines.append(f"{leftover.size_bytes / MIB:10.1f} MiB  {verdict}  {leftover.what}: {places}")
        if not leftover.deletable:
            lines.append(f"{'':16}if you do not want it: rm -r {leftover.paths[0]}")
    total = sum(leftover.size_bytes for leftover in leftovers if leftover.deletable)
    lines.append(
        f"{total / MIB:10.1f} MiB  in all can go" if total else "nothing can go: all of it is named by a commit"
    )
    return "\n".join(lines) + "\n"


def _dvc_gc(root: Path, mode: str) -> str:
    command = [sys.executable, "-m", "dvc", "gc", *KEPT, mode]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DataError(f"dvc gc failed: {done.stderr.strip()[-500:]}", root, "mend what DVC names, then: make gc")
    return done.stdout


def _adapter_is_recorded(root: Path) -> bool:
    """Whether dvc.lock names the adapter as it lies there: its checkpoint is of no use then."""
    if not (root / LOCK).is_file() or not (root / ADAPTER).is_dir():
        return False
    outs = read_stages((root / LOCK).read_text(encoding="utf-8")).get(TRAINING, {}).get("outs", [])
    locked = {out["path"]: out["md5"] for out in outs}.get(ADAPTER.as_posix())
    files = [file for file in (root / ADAPTER).rglob("*") if file.is_file()]
    return bool(locked == md5_of_folder({file.relative_to(root / ADAPTER).as_posix(): _md5(file) for file in files}))


def _md5(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "md5").hexdigest()


def _last_step(run: Path) -> str:
    steps = [int(path.name.rpartition("-")[2]) for path in run.glob("checkpoint-*")]
    return f"step {max(steps)}" if steps else "before its first checkpoint"


def _entries(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(folder.iterdir())) if folder.is_dir() else ()


def _size(paths: Sequence[Path]) -> int:
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    return sum(file.lstat().st_size for file in files if file.is_file())


def main(arguments: Sequence[str]) -> int:
    """Show what can go, and with --delete remove it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="make gc", description="what nothing names any more")
    parser.add_argument("--delete", action="store_true", help="remove it (make gc CONFIRM=1)")
    options = parser.parse_args(arguments)
    setup_logging("gc")
    root = repository_root()
    try:
        leftovers = find_leftovers(root)
        sys.stdout.write(describe(leftovers))
        if options.delete:
            logger.info("deleted: %.1f MiB; remotes are as they were", delete(root, leftovers) / MIB)
        elif any(leftover.deletable for leftover in leftovers):
            sys.stdout.write("nothing was deleted; this deletes what can go: make gc CONFIRM=1\n")
    except FinetuneError as error:
        logger.error("%s: %s", type(error).__name__, error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
