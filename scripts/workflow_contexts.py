"""A workflow's file and what the caller chose -> the job's matrix and what its expressions may read."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from workflow_actions import OUTPUTS, WorkflowError

SECRETS = {"GITHUB_TOKEN": "", "HF_TOKEN": ""}


@dataclass(frozen=True)
class Choice:
    """What the caller decides: which named steps (none: all), values that GitHub would give, and whose environment."""

    steps: tuple[str, ...] = ()
    matrix: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    first_on_path: Path | None = None
    set_up: bool = True
    slower: float = 1.0


def load(name: str, source: Path) -> dict[str, Any]:
    """The workflow of this name."""
    file = source / ".github" / "workflows" / f"{name}.yaml"
    if not file.is_file():
        raise WorkflowError(f"no workflow {file}")
    content: dict[str, Any] = YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))
    return content


def pairs(given: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """`name=value` -> name, value."""
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise WorkflowError(f"{text}: not name=value")
        yield name, value


def combinations(job: Mapping[str, Any]) -> list[dict[str, str]]:
    """The jobs that a matrix stands for; one without a matrix is one job."""
    matrix = dict(job.get("strategy", {}).get("matrix", {}))
    included = [dict(item) for item in matrix.pop("include", [])]
    axes = [[(axis, value) for value in values] for axis, values in matrix.items()]
    combined = [dict(combination) for combination in product(*axes) if combination]
    return [*combined, *included] or [{}]


def contexts(workflow: Mapping[str, Any], job: Mapping[str, Any], choice: Choice, source: Path) -> dict[str, Any]:
    """What expressions may read, before the first step; `--set` and `--matrix` change it."""
    chosen = dict(pairs(choice.matrix))
    fitting = [one for one in combinations(job) if {key: str(one.get(key)) for key in chosen} == chosen]
    if not fitting:
        raise WorkflowError(f"the matrix has no {chosen}")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=source, capture_output=True, text=True, check=True).stdout
    dispatched = (workflow["on"] if isinstance(workflow["on"], dict) else {}).get("workflow_dispatch") or {}
    needs = [job["needs"]] if isinstance(job.get("needs"), str) else job.get("needs", [])
    found: dict[str, Any] = {
        "github": {
            "workflow": workflow["name"],
            "ref": "refs/heads/main",
            "ref_name": "main",
            "sha": commit.strip(),
            "repository": "owner/Repository",
            "actor": "owner",
            "event_name": "push",
            "server_url": "https://github.com",
            "token": "",
        },
        "runner": {"os": "Linux", "arch": "X64"},
        "matrix": fitting[0],
        "secrets": SECRETS,
        "inputs": {name: entry["default"] for name, entry in dispatched.get("inputs", {}).items()},
        "needs": {name: {"result": "success", "outputs": {}} for name in needs},
        "steps": {
            step["id"]: {"outputs": dict(OUTPUTS.get(step.get("uses", "").partition("@")[0], {}))}
            for step in job["steps"]
            if "id" in step
        },
    }
    for name, value in pairs(choice.values):
        *folders, last = name.split(".")
        here = found
        for folder in folders:
            here = here.setdefault(folder, {})
        here[last] = value
    return found
