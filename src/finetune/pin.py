"""Branch and tag names in a recipe -> the commits they stand for now: `make pin NAME=dolores_v5`, or `make pin`.

    python -m finetune.pin [NAME] [--update]

Looks at fetch.base_model and every source of the Hub. Only the revisions are written: each other byte of the file,
comments too, stays. `--update` (`make pin UPDATE=1`) moves commits that are pinned already to the newest of `main`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from finetune.data.fetching.hub import HubUnreachableError, Repo, RepoType, allow_network, commit_of, raise_together
from finetune.errors import DataError, FinetuneError, ParamsError
from finetune.io import write_text
from finetune.log import logger, setup_logging
from finetune.params import load_params
from finetune.recipes import PARAMS_FILE, RECIPES
from finetune.runtime import pin_cpu_code_path

COMMIT = re.compile(r"[0-9a-f]{40}")
BRANCH = "main"


@dataclass(frozen=True)
class Pin:
    """A revision in the file: `key` names it, `line` and `column` (from 0) are where its value begins."""

    key: str
    repo: Repo
    line: int
    column: int


def pin(path: Path, *, update: bool) -> list[tuple[Pin, str]]:
    """Write the commits into the file, whole; returns each changed revision with its commit, in the file's order.

    Raises one error that lists every repository without such a branch or tag, before anything is written; and, after
    it is written, a ParamsError when the file has other faults.
    """
    try:
        text = path.read_bytes().decode("utf-8")
        pins = list(_pins(YAML(typ="rt", pure=True).load(text), path))
    except FileNotFoundError:
        raise ParamsError("file is missing", path, "name a recipe: make pin NAME=smoke") from None
    except (YAMLError, UnicodeDecodeError) as fault:
        raise ParamsError(f"not valid YAML: {fault}", path, "mend the line named above") from None
    wanted = [entry for entry in pins if update or not COMMIT.fullmatch(entry.repo.revision)]
    commits = _commits(wanted)
    changed = [(entry, commits[entry.key]) for entry in wanted if commits[entry.key] != entry.repo.revision]
    if changed:
        write_text(path, _with_commits(text, changed, path))
    for entry, commit in changed:
        logger.info("%s %s: %s -> %s", entry.key, entry.repo.repo_id, entry.repo.revision, commit)
        logger.info("  look at it: %s/tree/%s", entry.repo.page(), commit)
    logger.info("%s: %d of %d Hub revisions changed", path, len(changed), len(pins))
    load_params(path)
    return changed


def _pins(content: Any, path: Path) -> Iterator[Pin]:
    """Every revision below `fetch`, in the order base model, sources."""
    try:
        fetch = content["fetch"]
        places: list[tuple[str, RepoType, Any]] = [("fetch.base_model", "model", fetch["base_model"])]
        sources = fetch["sources"]
        places += [(f"fetch.sources.{source['name']}", "dataset", source["origin"]) for source in sources]
        for key, repo_type, mapping in places:
            if "repo_id" in mapping:
                repo = Repo(str(mapping["repo_id"]), repo_type, str(mapping["revision"]))
                yield Pin(key, repo, *mapping.lc.value("revision"))
    except (KeyError, TypeError, AttributeError) as fault:
        remedy = "write a `fetch` section as in recipes/smoke, with a `revision` (a branch will do) beside each repo_id"
        raise ParamsError(f"no base model and sources to pin: {fault!r}", path, remedy) from None


def _commits(pins: list[Pin]) -> dict[str, str]:
    commits: dict[str, str] = {}
    faults: list[DataError] = []
    for entry in pins:
        repo = entry.repo
        if COMMIT.fullmatch(repo.revision):
            repo = Repo(repo.repo_id, repo.repo_type, BRANCH)
        try:
            commits[entry.key] = commit_of(repo)
        except HubUnreachableError:
            raise
        except DataError as fault:
            faults.append(fault)
    raise_together(faults, "nothing was written: mend them, then run `make pin` again")
    return commits


def _with_commits(text: str, changed: list[tuple[Pin, str]], path: Path) -> str:
    lines = text.splitlines(keepends=True)
    # From the end: a revision further left on the same line keeps its column.
    for entry, commit in sorted(changed, key=lambda pair: (pair[0].line, pair[0].column), reverse=True):
        line, old = lines[entry.line], re.escape(entry.repo.revision)
        found = re.compile(rf"""(["']?){old}\1(?=[\s,}}]|$)""").match(line, entry.column)
        if found is None:
            raise ParamsError(f"{entry.key}.revision is not written in place", path, "write it as `revision: main`")
        # Quoted where YAML would read the digits as a number.
        value = commit if isinstance(YAML(typ="safe", pure=True).load(commit), str) else f'"{commit}"'
        lines[entry.line] = line[: entry.column] + value + line[found.end() :]
    return "".join(lines)


def main(arguments: list[str]) -> int:
    """Pin the recipe that the arguments name, or params.yaml; returns the exit code."""
    parser = argparse.ArgumentParser(prog="make pin", description="branch names in a recipe -> commits")
    parser.add_argument("name", nargs="?", help="a folder of recipes/; without one, params.yaml")
    parser.add_argument("--update", action="store_true", help=f"also move pinned commits to the newest of {BRANCH}")
    options = parser.parse_args(arguments)
    setup_logging("pin")
    try:
        # Notes the caller's own wish to stay offline, as the stages do.
        pin_cpu_code_path()
        allow_network()
        pin(RECIPES / options.name / "params.yaml" if options.name else PARAMS_FILE, update=options.update)
    except FinetuneError as error:
        logger.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
