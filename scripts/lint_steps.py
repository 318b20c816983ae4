"""Workflow files -> what shellcheck says of their `run:` steps; exit code 1 if it says anything.

A `run:` may hold no `${{ ... }}`: GitHub pastes the value into the script, where it is read as shell (values go through
env, where it is not). So what shellcheck reads here is what the shell reads there.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML


def faults(file: Path) -> list[str]:
    """Each fault of the steps of one workflow."""
    workflow: dict[str, Any] = YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))
    found = []
    shell = workflow.get("defaults", {}).get("run", {}).get("shell")
    for name, job in workflow["jobs"].items():
        for number, step in enumerate(job["steps"], start=1):
            if "run" not in step:
                continue
            place = f"{file}: job {name}, step {number} ({step.get('name', 'no name')})"
            if step.get("shell", shell) != "bash":
                found.append(f"{place}: the shell is not bash, which stops a pipe at its first failure")
            if "${{" in step["run"]:
                found.append(f"{place}: an expression inside run; give it by env")
            script = f"#!/bin/bash\nset -eo pipefail\n{step['run']}"
            done = subprocess.run(
                ["shellcheck", "--enable=check-set-e-suppressed", "-"],
                input=script,
                capture_output=True,
                text=True,
                check=False,
            )
            found += [f"{place}:\n{done.stdout}{done.stderr}"] if done.returncode else []
    return found


def main(files: list[str]) -> int:
    """Show the faults of all files."""
    found = [fault for file in files for fault in faults(Path(file))]
    sys.stdout.write("".join(f"{fault}\n" for fault in found))
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
