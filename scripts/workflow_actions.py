"""Stand-ins for the actions that the workflows use: a checkout is a clone, an upload is a copy.

An action that needs what is not on this machine is left out by name (LEFT_OUT); any other one, and any input that a
stand-in does not know, is a WorkflowError: a workflow that is run here is run as it is written.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

LEFT_OUT = {
    "docker/setup-buildx-action": "needs Docker",
    "docker/build-push-action": "needs Docker",
    "docker/login-action": "needs a registry",
    "actions/attest": "needs GitHub's signing service",
}


class WorkflowError(Exception):
    """A workflow that cannot be run here, or that GitHub would refuse; the text says why."""


@dataclass
class Machine:
    """The folders of one job, and what its steps hand on to the later ones."""

    source: Path
    out: Path
    env: dict[str, str]
    path: list[str]
    set_up: bool = True

    @property
    def workspace(self) -> Path:
        """Where the job works."""
        return self.out / "workspace"

    @property
    def temp(self) -> Path:
        """RUNNER_TEMP."""
        return self.out / "temp"


def taken(action: str, given: Mapping[str, str], known: set[str]) -> Mapping[str, str]:
    """The inputs, none of which the stand-in may be ignorant of."""
    if unknown := set(given) - known:
        raise WorkflowError(f"{action}: the stand-in does not know the input {sorted(unknown)[0]}")
    return given


def checkout(machine: Machine, given: Mapping[str, str]) -> dict[str, str]:
    """Clone HEAD of the source, as deep as is asked for (1 commit; 0: all)."""
    inputs = taken("checkout", given, {"persist-credentials", "fetch-depth", "clean"})
    if inputs.get("persist-credentials") != "false":
        raise WorkflowError("checkout: persist-credentials is not false, which leaves the token on the runner's disk")
    depth = inputs.get("fetch-depth", "1")
    shallow = [] if depth == "0" else ["--depth", depth]
    command = ["git", "clone", "--quiet", *shallow, machine.source.as_uri(), str(machine.workspace)]
    subprocess.run(command, check=True)
    return {}


def interpreter(version: str) -> Path:
    """An interpreter of this version, outside any virtual environment; raises WorkflowError where there is none."""
    name = f"python{version}"
    asked = 'import sys; print(sys.executable, "%d.%d" % sys.version_info[:2])'
    for folder in (str(Path(sys.base_prefix) / "bin"), outer_path()):
        # Asked, since a version manager puts a program of every name on PATH, some of which only complain.
        found = shutil.which(name, path=folder) or "false"
        done = subprocess.run([found, "-c", asked], capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.split()[-1] == version:
            return Path(done.stdout.rsplit(maxsplit=1)[0])
    raise WorkflowError(f"setup-python: no {name} on this machine\n  remedy: install it, or run another matrix")


def outer_path() -> str:
    """PATH without the folders of virtual environments."""
    folders = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(folder for folder in folders if not (Path(folder).parent / "pyvenv.cfg").exists())


def setup_python(machine: Machine, given: Mapping[str, str]) -> dict[str, str]:
    """Put the asked-for interpreter first on PATH, unless nothing is to be set up."""
    version = taken("setup-python", given, {"python-version"})["python-version"]
    if not machine.set_up:
        return {"python-version": version}
    folder = machine.out / "python"
    folder.mkdir(exist_ok=True)
    for name in ("python", "python3", f"python{version}"):
        (folder / name).symlink_to(interpreter(version))
    machine.path.insert(0, str(folder))
    return {"python-version": version}


def cache(_machine: Machine, given: Mapping[str, str]) -> dict[str, str]:
    """Nothing: what is cached on GitHub lies in the home folder here."""
    inputs = taken("cache", given, {"path", "key"})
    if not inputs["key"].strip("-"):
        raise WorkflowError("cache: the key is empty")
    return {"cache-hit": "false"}


def upload(machine: Machine, given: Mapping[str, str]) -> dict[str, str]:
    """Copy what the paths name into artifacts/NAME; each of them must name something."""
    inputs = taken("upload-artifact", given, {"name", "path", "retention-days", "if-no-files-found"})
    folder = machine.out / "artifacts" / inputs["name"]
    missing = []
    for line in filter(None, map(str.strip, inputs["path"].splitlines())):
        found = sorted(machine.workspace.glob(line.rstrip("/")))
        missing += [] if found else [line]
        for item in found:
            target = folder / item.relative_to(machine.workspace)
            target.parent.mkdir(parents=True, exist_ok=True)
            if item.is_dir():
                shutil.copytree(item, target, dirs_exist_ok=True)
            else:
                shutil.copy2(item, target)
    if missing:
        raise WorkflowError(f"upload-artifact: nothing at {', '.join(missing)}")
    return {"artifact-url": folder.as_uri()}


STAND_INS: dict[str, Callable[[Machine, Mapping[str, str]], dict[str, str]]] = {
    "actions/checkout": checkout,
    "actions/setup-python": setup_python,
    "actions/cache": cache,
    "actions/upload-artifact": upload,
}


def stand_in(action: str) -> Callable[[Machine, Mapping[str, str]], dict[str, str]]:
    """What is done here in place of an action; raises WorkflowError where nothing is known to do."""
    if action not in STAND_INS:
        raise WorkflowError(f"{action}: no stand-in for this action")
    return STAND_INS[action]


# What later steps may read although the action failed or was not reached: GitHub gives the empty string.
OUTPUTS = {"actions/upload-artifact": {"artifact-url": ""}}
