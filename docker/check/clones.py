"""This working tree -> a build context with planted secrets, and a clone that another user owns, as they are needed."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IDENTITY = ("-c", "user.name=check", "-c", "user.email=check@localhost", "-c", "commit.gpgsign=false")
# Files that a person may have lying about, each with the planted token in it.
PLANTED = (".env", "requirements/.pypirc", "docker/token.txt", "src/finetune/.env", ".cache/team.env", "scripts/token")


def copy_tree(target: Path) -> None:
    """What git tracks, or would track, in `target`, which is made anew."""
    shutil.rmtree(target, ignore_errors=True)
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in sorted(set(filter(None, names.split("\0")))):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def make_context(target: Path, token: str) -> None:
    """The folder that the builds read, with the token in files that must not reach an image."""
    copy_tree(target)
    for name in PLANTED:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(f"HF_TOKEN={token}\n")


def make_clone(target: Path, uid: int) -> None:
    """A repository with one commit that belongs to `uid`."""
    copy_tree(target)
    for command in (("init", "--quiet"), ("add", "--all"), ("commit", "--quiet", "--message", "clone")):
        subprocess.run(["git", *IDENTITY, *command], cwd=target, check=True)
    give(target, uid)


def copy_clone(source: Path, target: Path) -> None:
    """The clone with its outs and DVC's cache, in another folder, without its checkpoints: training begins anew."""
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run(["cp", "--archive", str(source), str(target)], check=True)
    shutil.rmtree(target / ".cache", ignore_errors=True)


def give(folder: Path, uid: int) -> None:
    """Make everything below `folder` belong to `uid`."""
    for path in (folder, *folder.rglob("*")):
        os.chown(path, uid, uid, follow_symlinks=False)


def owners(folder: Path) -> dict[int, int]:
    """Owner -> number of files and folders below `folder`."""
    counts: dict[int, int] = {}
    for path in (folder, *folder.rglob("*")):
        uid = path.lstat().st_uid
        counts[uid] = counts.get(uid, 0) + 1
    return counts


def changed(folder: Path) -> str:
    """What git sees changed in the clone, without writing its index anew as another user."""
    command = ["git", "--no-optional-locks", "-c", f"safe.directory={folder}", "status", "--porcelain"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def hashes(folder: Path) -> Mapping[str, str]:
    """SHA-256 of every file below `folder`, by its path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
