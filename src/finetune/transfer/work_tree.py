"""A recorded version -> a checkout of its commit that is ready to compute the version again, beside the user's own.

It has a DVC cache of its own. With this clone's, a run that gives other bytes would be stored in the run cache under
the same inputs, and the next `dvc repro` of the user could be handed those.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from finetune import git_history
from finetune.errors import DataError
from finetune.io import read_json, write_bytes, write_json
from finetune.log import logger
from finetune.transfer.recorded import LOCK, PARAMS_FILE, Recorded, pipeline
from finetune.transfer.stored_outs import take_outs

FOLDER = Path(".cache/rebuild")
# In the work tree, where git ignores it: which version it is ready for.
READY = Path(".cache/rebuild.json")
FETCH = "fetch"
BASE_MANIFEST = Path("data/base_manifest.json")
# What decides bytes: the direct pins of these files, and how llama.cpp is built.
PINS = ("data", "train", "export")
BUILDS = ("requirements/llama-build.txt", "requirements/llama-sdist.txt")


def prepare(recorded: Recorded, root: Path, tree: Path, first: str) -> list[str]:
    """Make `tree` ready, with the outs of the stages before `first`; returns the names of all but `register`.

    A tree that an interrupted rebuild of the same version left is taken as it is. Raises DataError for a stage that is
    none, and where packages or tools here are not those of the commit.
    """
    names = [name for name in pipeline(root, recorded.commit) if name != git_history.REGISTER]
    if first not in names:
        raise DataError(f"there is no stage {first!r}", "FROM", f"FROM= one of {', '.join(names)}")
    mark = {"commit": recorded.commit, "content_sha256": recorded.content_sha256, "first": first}
    if (tree / READY).is_file() and read_json(tree / READY) == mark:
        logger.info("going on in %s", tree)
        return names
    remove(root, tree)
    logger.info("checking commit %s out into %s", recorded.commit[:12], tree)
    git_history.add_worktree(root, tree, recorded.commit)
    _check_environment(tree, root, recorded.commit)
    if recorded.params is not None:
        logger.warning("params.yaml is the run's: the commit has another one; code and data are the commit's")
        write_bytes(tree / PARAMS_FILE, recorded.params)
    _take_before(recorded, root, tree, names[: names.index(first)])
    write_json(tree / READY, mark)
    return names


def remove(root: Path, tree: Path) -> None:
    """Remove a work tree, whole or half made, and git's note of it."""
    if tree.exists():
        shutil.rmtree(tree)
    git_history.prune_worktrees(root)


def _take_before(recorded: Recorded, root: Path, tree: Path, taken: Sequence[str]) -> None:
    """Bring the outs of `taken`; a stage whose outs are nowhere runs again, as DVC finds by itself."""
    stages = {name: recorded.stages[name] for name in taken if name in recorded.stages}
    _write_lock(tree, stages)
    there = git_history.tracked(root, recorded.commit)
    for out in (out for stage in stages.values() for out in stage["outs"] if out["path"] in there):
        # Metrics and plots are in git, and committed after the run.
        if (content := git_history.find_content(root, out["path"], out["md5"])) is not None:
            write_bytes(tree / out["path"], content)
    if stages and (said := take_outs(root, tree, list(stages))):
        logger.warning("what neither cache nor remote has of %s is made again: %s", ", ".join(stages), said)
    if FETCH in stages and not _has_base(tree):
        logger.warning("the base model is not in the Hub's cache: fetch runs too")
        _write_lock(tree, {})


def _write_lock(tree: Path, stages: Mapping[str, Any]) -> None:
    with (tree / LOCK).open("w", encoding="utf-8") as handle:
        YAML(typ="safe", pure=True).dump({"schema": "2.0", "stages": dict(stages)}, handle)


def _has_base(tree: Path) -> bool:
    """Whether the Hub's cache has every file of the base; fetch leaves them there, not in an out."""
    from huggingface_hub import try_to_load_from_cache

    manifest: Any = read_json(tree / BASE_MANIFEST) if (tree / BASE_MANIFEST).is_file() else {"kind": ""}
    if manifest["kind"] != "hub":
        return True
    found = (
        try_to_load_from_cache(manifest["repo_id"], file["path"], revision=manifest["revision"])
        for file in manifest["files"]
    )
    return all(isinstance(path, str) for path in found)


def _check_environment(tree: Path, root: Path, commit: str) -> None:
    different = [line for name in PINS for line in _other_pins(tree / f"requirements/{name}.txt")]
    different += [f"{name} is another" for name in BUILDS if (tree / name).read_bytes() != (root / name).read_bytes()]
    if different:
        what = f"this environment is not the one that made the version: {'; '.join(different)}"
        remedy = f"git worktree add ../rebuild {commit}, there: make setup, and this command again"
        raise DataError(what, sys.prefix, remedy)


def _other_pins(file: Path) -> list[str]:
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        name, _, wanted = line.partition("#")[0].strip().partition("==")
        if not wanted:
            continue
        try:
            here = version(name).partition("+")[0]
        except PackageNotFoundError:
            here = "missing"
        if here != wanted:
            found.append(f"{name} is {here}, not {wanted}")
    return found
