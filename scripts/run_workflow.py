"""`python scripts/run_workflow.py ci smoke`: run a job of .github/workflows/ here, in a clone of this commit.

The job's own `run:` steps run in its own shell, with its env, matrix, conditions, time limit and expressions; actions
have stand-ins (workflow_actions.py). Exit code 1 when a step failed. What is not committed is not in the clone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workflow_actions import LEFT_OUT, Machine, WorkflowError, outer_path, stand_in
from workflow_contexts import Choice, contexts, load, pairs
from workflow_expressions import ExpressionError, condition, filled

ROOT = Path(__file__).resolve().parent.parent
JOB_KEYS = {
    *("concurrency", "defaults", "environment", "env", "needs", "outputs", "permissions", "runs-on", "steps"),
    *("strategy", "timeout-minutes"),
}
STEP_KEYS = {
    *("continue-on-error", "env", "id", "if", "name", "run", "shell", "timeout-minutes", "uses", "with"),
    "working-directory",
}
# https://docs.github.com/en/actions/reference/workflows-and-actions/workflow-syntax (jobs.<job_id>.steps[*].shell)
SHELLS = {"": "bash -e {0}", "bash": "bash --noprofile --norc -eo pipefail {0}", "sh": "sh -e {0}"}
# Of the caller's environment: where things are and how to reach package indexes, never what this repository reads.
KEPT = {
    *("CC", "CXX", "HOME", "LANG", "LOGNAME", "SHELL", "TERM", "TMPDIR", "USER", "XDG_CACHE_HOME"),
    *("NODE_EXTRA_CA_CERTS", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"),
}
KEPT_PREFIXES = ("PIP_", "NPM_CONFIG_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
HANDED_ON = ("OUTPUT", "ENV", "PATH", "STEP_SUMMARY")


@dataclass(frozen=True)
class Result:
    """What became of one step."""

    name: str
    outcome: str
    seconds: float
    log: str


class Job:
    """One job on its way through its steps."""

    def __init__(self, workflow: Mapping[str, Any], name: str, machine: Machine, choice: Choice) -> None:
        if name not in workflow["jobs"]:
            raise WorkflowError(f"no job {name}; there are: {', '.join(workflow['jobs'])}")
        self.body, self.machine, self.choice = workflow["jobs"][name], machine, choice
        if unknown := set(self.body) - JOB_KEYS:
            raise WorkflowError(f"job {name}: {sorted(unknown)[0]} is not known here")
        if "timeout-minutes" not in self.body:
            raise WorkflowError(f"job {name}: no timeout-minutes")
        self.contexts = contexts(workflow, self.body, choice, machine.source)
        self.contexts["runner"]["temp"] = str(machine.temp)
        self.contexts["env"] = {}
        self.defaults = {**workflow.get("defaults", {}).get("run", {}), **self.body.get("defaults", {}).get("run", {})}
        self.environments = [workflow.get("env", {}), self.body.get("env", {})]
        self.first_on_path = [str(choice.first_on_path)] if choice.first_on_path else []
        self.failed = False
        self.end = time.monotonic() + 60 * choice.slower * self.body["timeout-minutes"]

    def fill(self, text: object) -> str:
        """A text of the workflow with its expressions evaluated."""
        return filled(str(text).lower() if isinstance(text, bool) else str(text), self.contexts, self.machine.workspace)

    def steps(self) -> Iterator[Result]:
        """Run what is chosen, in order."""
        for folder in (self.machine.temp, self.machine.out / "files"):
            folder.mkdir(parents=True)
        for number, step in enumerate(self.body["steps"]):
            if unknown := set(step) - STEP_KEYS:
                raise WorkflowError(f"step {number + 1}: {sorted(unknown)[0]} is not known here")
            yield self.step(number, step)
            if number == 0 and not self.choice.set_up:
                self.share_environment()
        if not self.failed and not self.choice.steps:
            for text in self.body.get("outputs", {}).values():
                self.fill(text)

    def share_environment(self) -> None:
        """Use this repository's environment and tools instead of making new ones, which takes minutes.

        By programs that call them and never by a link to the folder: a set-up in the clone would empty it.
        """
        own, programs = self.machine.workspace / ".venv" / "bin", self.machine.out / "programs"
        for folder in (own, programs):
            folder.mkdir(parents=True)
        python = f'case "$1 $2 $3" in "-m venv "*|"-m pip install") exit 0;; esac\nexec "{ROOT}/.venv/bin/python" "$@"'
        make = f'exec "{shutil.which("make", path=outer_path())}" --old-file=setup "$@"'
        for file, text in ((own / "python", python), (programs / "python", python), (programs / "make", make)):
            file.write_text(f"#!/bin/sh\n{text}\n")
            file.chmod(0o755)
        self.first_on_path.append(str(programs))
        self.machine.path.append(str(ROOT / ".venv" / "bin"))
        self.machine.env["FINETUNE_TOOLS"] = str(ROOT / ".tools")
        self.machine.env["PYTHONPATH"] = str(self.machine.workspace / "src")

    def step(self, number: int, step: Mapping[str, Any]) -> Result:
        """Run one step, or say why it was not run."""
        name = step.get("name") or step.get("uses") or step["run"].splitlines()[0]
        started, status = time.monotonic(), {"always": True, "cancelled": False}
        self.contexts["status"] = {**status, "success": not self.failed, "failure": self.failed}
        holds = condition(str(step.get("if", "success()")), self.contexts, self.machine.workspace)
        action = step.get("uses", "").partition("@")[0]
        # Evaluated whether or not the step is run: what they name has to exist.
        given = {key: self.fill(value) for key, value in step.get("with", {}).items()}
        environment = self.environment(step)
        if self.choice.steps and "name" in step and name not in self.choice.steps:
            return Result(name, "not chosen", 0.0, "")
        if not holds:
            return Result(name, "skipped", 0.0, "")
        if action in LEFT_OUT:
            return Result(name, "left out", 0.0, LEFT_OUT[action])
        say(f"--- {name}")
        log, outcome = "", "success"
        try:
            if action:
                self.remember(step, stand_in(action)(self.machine, given))
            else:
                log = self.run(number, step, environment)
        except (WorkflowError, subprocess.CalledProcessError) as error:
            say(f"error: {error}")
            log, outcome = str(error), "failure"
            self.failed = self.failed or not step.get("continue-on-error", False)
        return Result(name, outcome, time.monotonic() - started, log)

    def remember(self, step: Mapping[str, Any], outputs: Mapping[str, str]) -> None:
        """Keep the outputs of a step that has an id."""
        if "id" in step:
            self.contexts["steps"][step["id"]]["outputs"].update(outputs)

    def environment(self, step: Mapping[str, Any]) -> dict[str, str]:
        """Environment of a step: GitHub's own names, then the workflow's, the job's, the step's, and the caller's."""
        github, machine = self.contexts["github"], self.machine
        named: dict[str, str] = {}
        for entries in (*self.environments, step.get("env", {})):
            named.update({key: self.fill(value) for key, value in entries.items()})
            self.contexts["env"] = {**machine.env, **named}
        return {
            **{name: value for name, value in os.environ.items() if kept(name)},
            **{f"GITHUB_{key.upper()}": value for key, value in github.items() if key != "token"},
            **{"CI": "true", "GITHUB_ACTIONS": "true", "GITHUB_WORKSPACE": str(machine.workspace)},
            **{"RUNNER_OS": "Linux", "RUNNER_ARCH": "X64", "RUNNER_TEMP": str(machine.temp)},
            **machine.env,
            **named,
            **dict(pairs(self.choice.env)),
            "PATH": os.pathsep.join([*self.first_on_path, *machine.path, outer_path()]),
        }

    def run(self, number: int, step: Mapping[str, Any], environment: dict[str, str]) -> str:
        """Run a `run:` step in its shell; returns what it wrote, raises WorkflowError if it failed."""
        files = self.machine.out / "files" / str(number)
        files.mkdir()
        for name in HANDED_ON:
            (files / name).touch()
            environment[f"GITHUB_{name}"] = str(files / name)
        shell = SHELLS.get(step.get("shell") or self.defaults.get("shell", ""))
        if shell is None:
            raise WorkflowError(f"shell {step['shell']} is not known here")
        script = files / "script"
        script.write_text(self.fill(step["run"]), encoding="utf-8")
        limit_s = min(self.end - time.monotonic(), 60 * self.choice.slower * step.get("timeout-minutes", 1440))
        folder = self.machine.workspace / self.fill(step.get("working-directory", "."))
        code, log = stream(shell.format(script).split(), folder, environment, limit_s)
        self.remember(step, dict(line.split("=", 1) for line in (files / "OUTPUT").read_text().splitlines()))
        self.machine.env.update(dict(line.split("=", 1) for line in (files / "ENV").read_text().splitlines()))
        self.machine.path[:0] = (files / "PATH").read_text().splitlines()
        with (self.machine.out / "summary.md").open("a", encoding="utf-8") as summary:
            summary.write((files / "STEP_SUMMARY").read_text(encoding="utf-8"))
        if code:
            raise WorkflowError(f"exit code {code}\n{log}")
        return log


def kept(name: str) -> bool:
    """Whether a variable of the caller's environment is handed to the steps."""
    return name in KEPT or name.upper().startswith(KEPT_PREFIXES)


def say(text: str) -> None:
    """Write one line to stdout."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def stream(command: list[str], folder: Path, environment: dict[str, str], limit_s: float) -> tuple[int, str]:
    """Run a command, its output shown as it comes; killed with all that it started after `limit_s` seconds."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    timer = threading.Timer(max(limit_s, 0), os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    lines = []
    for line in process.stdout or ():
        lines.append(line.decode(errors="replace"))
        sys.stdout.write(lines[-1])
        sys.stdout.flush()
    code = process.wait()
    timer.cancel()
    return code, "".join(lines)


def run_job(workflow: str, job: str, source: Path, out: Path, choice: Choice) -> list[Result]:
    """Run a job of a workflow of the repository at `source`; its workspace, summary.md and artifacts/ are in `out`.

    Raises:
        WorkflowError: The workflow uses what is not known here.
        ExpressionError: An expression does.
    """
    body = Job(load(workflow, source), job, Machine(source.resolve(), out.resolve(), {}, [], choice.set_up), choice)
    return list(body.steps())


def main() -> int:
    """Parse the options, run the job, and show what became of each step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("workflow", help="ci, image, audit, release, gpu")
    parser.add_argument("job")
    parser.add_argument("--step", action="append", default=[], help="of the named steps only this one (repeatable)")
    parser.add_argument("--matrix", action="append", default=[], help="python=3.12")
    parser.add_argument("--set", action="append", default=[], help="github.ref_name=v0.1.0, or any other context")
    parser.add_argument("--env", action="append", default=[], help="TORCH= overrides what the workflow says")
    parser.add_argument("--source", type=Path, default=ROOT, help="the repository to clone")
    parser.add_argument("--out", type=Path, help="a folder that does not exist; else a new one in the temporary folder")
    parser.add_argument("--slower", type=float, default=1.0, help="multiply the time limits, on a machine that is busy")
    parser.add_argument("--no-setup", action="store_true", help="use this repository's .venv and .tools as they are")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp(prefix="workflow-")) / "job"
    choice = Choice(
        steps=tuple(options.step),
        matrix=tuple(options.matrix),
        values=tuple(options.set),
        env=tuple(options.env),
        set_up=not options.no_setup,
        slower=options.slower,
    )
    try:
        results = run_job(options.workflow, options.job, options.source, out, choice)
    except (WorkflowError, ExpressionError) as error:
        say(f"run_workflow: {error}")
        return 1
    for result in results:
        say(f"{result.outcome:<9} {result.seconds:8.1f} s  {result.name}")
    say(f"workspace, summary.md and artifacts: {out}")
    return int(any(result.outcome == "failure" for result in results))


if __name__ == "__main__":
    raise SystemExit(main())
