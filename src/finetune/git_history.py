"""SHA-256 of a GGUF, git history -> the commit that recorded it, and whether that commit holds all that made the file.

The stage quantize_gguf writes the SHA-256 of each file into metrics/quantize_gguf.json, which is in git. A file cannot
name its own commit: the commit holds the file's hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from finetune.errors import DataError
from finetune.lineage import without_passwords

METRICS, LOCK, PARAMS_FILE = "metrics/quantize_gguf.json", "dvc.lock", "params.yaml"
# A name that begins with a dash would be an option of git.
COMMIT = re.compile(r"[0-9a-f]{7,64}")
# Where the pipeline puts a file, from the root of the repository.
GGUF_PATH = "models/gguf/model-{type}.gguf"
# The last stage writes a version, not a model, and depends on the registry.
REGISTER = "register"
# DVC ends the hash of a folder with it.
FOLDER = ".dir"


@dataclass(frozen=True)
class Recorded:
    """A commit and what its metrics say of the GGUF files: {type: figures, with sha256}.

    `changed`: what dvc.lock names and the commit holds otherwise; empty for a commit that holds all that made them.
    """

    commit: str
    date: str
    subject: str
    types: Mapping[str, Mapping[str, Any]]
    changed: tuple[str, ...]

    def expected(self) -> dict[str, str]:
        """Path of each GGUF below the repository's root -> its SHA-256."""
        hashes = {name: figures["sha256"] for name, figures in sorted(self.types.items()) if "sha256" in figures}
        return {GGUF_PATH.format(type=name): digest for name, digest in hashes.items()}


def find_file(root: Path, sha256: str) -> Recorded | None:
    """The first commit of any branch whose metrics hold `sha256`, one that holds all that made it before others."""
    shown = _git(root, "log", "--all", "--reverse", "--format=%H", f"-S{sha256}", "--", METRICS)
    found = [read_commit(root, commit) for commit in shown.decode().split()]
    recorded = [each for each in found if each is not None and sha256 in each.expected().values()]
    return next((each for each in recorded if not each.changed), next(iter(recorded), None))


def read_commit(root: Path, commit: str) -> Recorded | None:
    """What a commit, named by its hash, recorded; None when this clone does not have it or it has no metrics."""
    if not COMMIT.fullmatch(commit):
        return None
    try:
        date, _, subject = _git(root, "log", "-1", "--format=%cs %s", commit).decode("utf-8", "replace").partition(" ")
        metrics = json.loads(_git(root, "show", f"{commit}:./{METRICS}"))
    except subprocess.CalledProcessError:
        return None
    return Recorded(commit, date, subject.strip(), metrics["types"], tuple(_changed(root, commit)))


def clone_source(root: Path) -> str:
    """The address of the remote `origin` without passwords, or the folder where there is none."""
    try:
        return without_passwords(_git(root, "remote", "get-url", "origin").decode().strip())
    except subprocess.CalledProcessError:
        return str(root)


def _changed(root: Path, commit: str) -> Iterator[str]:
    """Files and parameters that dvc.lock of a commit names with another content than the commit has."""
    there = tracked(root, commit)
    if not {LOCK, PARAMS_FILE} <= there:
        yield from sorted({LOCK, PARAMS_FILE} - there)
        return
    yaml = YAML(typ="safe", pure=True)
    lock, params = (yaml.load(read_committed(root, commit, name).decode()) for name in (LOCK, PARAMS_FILE))
    yield from differing(root, commit, lock["stages"], params)


def tracked(root: Path, commit: str) -> set[str]:
    """The paths of all files of a commit."""
    return set(_git(root, "ls-tree", "-r", "-z", "--name-only", commit).decode("utf-8", "replace").split("\0"))


def read_committed(root: Path, commit: str, path: str) -> bytes:
    """A file of a commit; raises CalledProcessError where it has none such."""
    return _git(root, "show", f"{commit}:./{path}")


def differing(root: Path, commit: str, locked: Mapping[str, Any], params: Any) -> Iterator[str]:
    """What the stages of a dvc.lock name with another content than the files of a commit, and `params`, have."""
    there = tracked(root, commit)
    stages = [stage for name, stage in locked.items() if name != REGISTER]
    entries = [entry for stage in stages for entry in (*stage.get("deps", []), *stage.get("outs", []))]
    wanted = {entry["path"]: entry.get("md5", "") for entry in entries if entry["path"] in there}
    folders = {
        entry["path"]: {path.removeprefix(f"{entry['path']}/"): path for path in there if _below(path, entry["path"])}
        for entry in entries
        if entry.get("md5", "").endswith(FOLDER)
    }
    # A folder that git holds nothing of is an out: its content is DVC's to keep.
    wanted |= {entry["path"]: entry["md5"] for entry in entries if folders.get(entry["path"])}
    inside = {path for files in folders.values() for path in files.values()}
    held = _md5_of(root, commit, sorted({*wanted, *inside} & there))
    held |= {path: md5_of_folder({name: held[file] for name, file in files.items()}) for path, files in folders.items()}
    yield from (path for path in sorted(wanted) if held[path] != wanted[path])
    used = {key: value for stage in stages for key, value in stage.get("params", {}).get(PARAMS_FILE, {}).items()}
    yield from (f"{PARAMS_FILE}: {key}" for key, value in sorted(used.items()) if _at(params, key) != value)


def has_commit(root: Path, commit: str) -> bool:
    """Whether this clone has the commit of this hash."""
    try:
        _git(root, "cat-file", "-e", f"{commit}^{{commit}}")
    except subprocess.CalledProcessError:
        return False
    return True


def is_shallow(root: Path) -> bool:
    """Whether this clone lacks a part of the history."""
    return _git(root, "rev-parse", "--is-shallow-repository").strip() == b"true"


def find_content(root: Path, path: str, md5: str) -> bytes | None:
    """The content of a file with this MD5, as `root` or any commit of any branch has it; None where there is none."""
    if (root / path).is_file():
        content = (root / path).read_bytes()
        if hashlib.md5(content, usedforsecurity=False).hexdigest() == md5:
            return content
    for commit in _git(root, "log", "--all", "--format=%H", "--diff-filter=d", "--", path).decode().split():
        content = read_committed(root, commit, path)
        if hashlib.md5(content, usedforsecurity=False).hexdigest() == md5:
            return content
    return None


def add_worktree(root: Path, folder: Path, commit: str) -> None:
    """Check a commit out into a new folder; the working tree of `root` is not touched."""
    prune_worktrees(root)
    _git(root, "worktree", "add", "--detach", str(folder), commit)


def prune_worktrees(root: Path) -> None:
    """Let git forget the work trees whose folders are gone."""
    _git(root, "worktree", "prune")


def _below(path: str, folder: str) -> bool:
    return path.startswith(f"{folder}/")


def md5_of_folder(hashes: Mapping[str, str]) -> str:
    """DVC's hash of a folder, from its files' names and hashes (dvc-data, hashfile/tree.py)."""
    listed = [
        {"md5": digest, "relpath": name} for name, digest in sorted(hashes.items(), key=lambda item: item[0].split("/"))
    ]
    content = json.dumps(listed, sort_keys=True).encode()
    return hashlib.md5(content, usedforsecurity=False).hexdigest() + FOLDER


def _md5_of(root: Path, commit: str, paths: Sequence[str]) -> dict[str, str]:
    """MD5, which is DVC's hash, of files of a commit, read by one process."""
    asked = "".join(f"{commit}:./{path}\n" for path in paths)
    output, at, hashes = _git(root, "cat-file", "--batch", given=asked.encode()), 0, {}
    for path in paths:
        end = output.index(b"\n", at)
        size_bytes = int(output[at:end].rsplit(b" ", 1)[1])
        content, at = output[end + 1 : end + 1 + size_bytes], end + size_bytes + 2
        hashes[path] = hashlib.md5(content, usedforsecurity=False).hexdigest()
    return hashes


def _at(params: Any, key: str) -> Any:
    for part in key.split("."):
        params = params.get(part) if isinstance(params, Mapping) else None
    return params


def _git(root: Path, *arguments: str, given: bytes = b"") -> bytes:
    """The output of a git command; raises CalledProcessError, and DataError outside a repository or without git."""
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, input=given, capture_output=True, env={**os.environ, "LC_ALL": "C"})
    except FileNotFoundError:
        raise DataError("git is not installed", "PATH", "install git") from None
    if done.returncode and b"not a git repository" in done.stderr:
        raise DataError(
            "not a git repository, so no commit can be found", root, "run this in the repository that made the file"
        )
    done.check_returncode()
    return done.stdout
