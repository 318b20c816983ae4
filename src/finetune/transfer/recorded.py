"""A version, this clone -> the commit, the dvc.lock and the parameters that made it, verified against each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from finetune import git_history
from finetune.errors import DataError
from finetune.tracking.versions import Version, read_text
from finetune.transfer.hashes import ASK, read_lock, tagged_hash

LOCK, PARAMS_FILE, PIPELINE = git_history.LOCK, git_history.PARAMS_FILE, "dvc.yaml"
PULL = "make pull NAME=... gets its files all the same"


@dataclass(frozen=True)
class Recorded:
    """What a version says of itself: its commit, the stages of its dvc.lock without `register`, its content's hash.

    `params`: its params.yaml where that is not the commit's own, else None.
    """

    title: str
    commit: str
    stages: Mapping[str, Any]
    content_sha256: str
    params: bytes | None


def read_recorded(client: Any, version: Version, root: Path, folder: Path) -> Recorded:
    """Read a version's dvc.lock and params.yaml, by way of files in `folder`, and look its commit up in `root`.

    Raises DataError where the commit is not here, where dvc.lock is not the one of the version's tags, or where the
    commit does not hold the code, the commands or the data that this dvc.lock names.
    """
    title, commit = version.title(), version.tags.get("git.commit", "")
    if not git_history.COMMIT.fullmatch(commit):
        what = f"{title} was registered outside git: no commit holds the code that made it"
        raise DataError(what, f"tag git.commit: {commit!r:.80}", PULL)
    if not git_history.has_commit(root, commit):
        what = f"commit {commit} of {title} is not in this clone"
        raise DataError(what, root, "git fetch --all, or run this in the repository that made the version")
    if read_text(client, version, LOCK, folder) is None:
        raise DataError(f"{title} holds no dvc.lock", f"artifacts of run {version.run_id}", ASK)
    stages = read_lock(folder / LOCK, tagged_hash(version.tags, "dvc_lock_sha256", title), title)
    stages.pop(git_history.REGISTER, None)
    own = git_history.read_committed(root, commit, PARAMS_FILE)
    text = read_text(client, version, PARAMS_FILE, folder)
    params = own if text is None else text.encode()
    if lost := not_committed(root, commit, stages, params):
        what = f"{title} was made from what its commit does not hold: {', '.join(lost[:8])}"
        raise DataError(what, f"commit {commit}", f"it was never committed, so git cannot give it back; {PULL}")
    content = tagged_hash(version.tags, "content_sha256", title)
    return Recorded(title, commit, stages, content, None if params == own else params)


def not_committed(root: Path, commit: str, stages: Mapping[str, Any], params: bytes) -> list[str]:
    """Files, commands and parameters that these stages of a dvc.lock name, and neither the commit nor `params` holds.

    A stage's outs are left out: metrics and plots are committed after the run that a version was registered in.
    """
    yaml = YAML(typ="safe", pure=True)
    made = {out["path"] for stage in stages.values() for out in stage.get("outs", [])}
    inputs = {
        name: {**stage, "outs": [], "deps": [dep for dep in stage.get("deps", []) if not _below(dep["path"], made)]}
        for name, stage in stages.items()
    }
    try:
        values = yaml.load(params.decode("utf-8"))
    except (YAMLError, UnicodeDecodeError, RecursionError):
        return [PARAMS_FILE]
    lost = list(git_history.differing(root, commit, inputs, values))
    there = git_history.tracked(root, commit)
    named = sorted({dep["path"] for stage in inputs.values() for dep in stage["deps"]})
    lost += [path for path in named if path not in there and not any(_below(file, [path]) for file in there)]
    commands = pipeline(root, commit)
    lost += [f"{PIPELINE}: {name}" for name in stages if commands.get(name, {}).get("cmd") != stages[name].get("cmd")]
    return lost


def pipeline(root: Path, commit: str) -> dict[str, Any]:
    """The stages of a commit's dvc.yaml, in their order."""
    stages: dict[str, Any] = YAML(typ="safe", pure=True).load(
        git_history.read_committed(root, commit, PIPELINE).decode("utf-8")
    )["stages"]
    return stages


def _below(path: str, folders: Iterable[str]) -> bool:
    return any(path == folder or path.startswith(f"{folder}/") for folder in folders)
