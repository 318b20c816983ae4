"""scripts/run_workflow.py on workflows of a few lines: what a step is given, what it hands on, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from run_workflow import Result, run_job  # noqa: E402
from workflow_actions import WorkflowError  # noqa: E402
from workflow_contexts import Choice, combinations  # noqa: E402
from workflow_expressions import ExpressionError  # noqa: E402

HEAD = """\
name: try
on: {push: {}}
permissions: {contents: read}
defaults: {run: {shell: bash}}
env: {COLOUR: red, SIZE: "1"}
jobs:
  one:
    runs-on: ubuntu-24.04
    timeout-minutes: 1
    env: {SIZE: "2"}
    steps:
      - uses: actions/checkout@0
        with: {persist-credentials: false}
"""


def repository(folder: Path, steps: str) -> Path:
    """A repository with one workflow, `try`, of one job, `one`."""
    file = folder / "source/.github/workflows/try.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(HEAD + steps)
    for words in (
        ["init", "--quiet"],
        ["add", "."],
        ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "t"],
    ):
        subprocess.run(["git", *words], cwd=folder / "source", check=True)
    return folder / "source"


def run(folder: Path, steps: str, choice: Choice = Choice()) -> list[Result]:  # noqa: B008
    return run_job("try", "one", repository(folder, steps), folder / "out", choice)


def test_outputs_variables_folders_of_programs_and_the_summary_reach_the_later_steps(tmp_path: Path) -> None:
    steps = """\
      - id: first
        run: |
          echo "a=b=c" >> "$GITHUB_OUTPUT"
          echo "NAME=value" >> "$GITHUB_ENV"
          mkdir "$RUNNER_TEMP/programs"
          printf '#!/bin/sh\\necho hello\\n' > "$RUNNER_TEMP/programs/greet"
          chmod +x "$RUNNER_TEMP/programs/greet"
          echo "$RUNNER_TEMP/programs" >> "$GITHUB_PATH"
          echo "# page" >> "$GITHUB_STEP_SUMMARY"
      - env: {GIVEN: "${{ steps.first.outputs.a }}"}
        run: echo "$GIVEN $NAME $COLOUR $SIZE $(greet) $GITHUB_REF_NAME ${{ env.SIZE }}" | tee -a "$GITHUB_STEP_SUMMARY"
"""
    results = run(tmp_path, steps)
    assert results[-1].log == "b=c value red 2 hello main 2\n"
    assert (tmp_path / "out/summary.md").read_text() == "# page\nb=c value red 2 hello main 2\n"


def test_after_a_failure_only_what_asks_for_it_is_run_and_the_job_has_failed(tmp_path: Path) -> None:
    steps = """\
      - name: broken
        run: false | true
      - name: next
        run: echo next
      - name: last
        if: always()
        run: echo last
      - name: on failure
        if: failure()
        run: echo failed
"""
    found = {result.name: result.outcome for result in run(tmp_path, steps)[1:]}
    # With `bash -e` alone, which GitHub takes where no shell is named, the pipe would pass.
    assert found == {"broken": "failure", "next": "skipped", "last": "success", "on failure": "success"}


def test_the_shell_that_is_not_named_is_bash_without_pipefail(tmp_path: Path) -> None:
    source = repository(tmp_path, "      - run: false | true\n")
    file = source / ".github/workflows/try.yaml"
    file.write_text(file.read_text().replace("defaults: {run: {shell: bash}}\n", ""))
    assert run_job("try", "one", source, tmp_path / "out", Choice())[-1].outcome == "success"


def test_a_step_that_may_fail_does_not_end_the_job(tmp_path: Path) -> None:
    steps = "      - run: exit 3\n        continue-on-error: true\n      - run: echo on\n"
    assert [result.outcome for result in run(tmp_path, steps)] == ["success", "failure", "success"]


def test_a_step_past_the_time_limit_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    results = run(tmp_path, "      - run: sleep 60 | sleep 61\n        timeout-minutes: 0.02\n")
    assert results[-1].outcome == "failure"
    assert results[-1].seconds < 10
    patient = run(tmp_path / "2", "      - run: sleep 3\n        timeout-minutes: 0.02\n", Choice(slower=50))
    assert patient[-1].outcome == "success"


def test_nothing_of_the_callers_environment_that_this_repository_reads_is_handed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_TRACKING_URI", "FINETUNE_TOOLS", "PYTHONPATH", "DVC_ROOT", "HF_TOKEN", "VIRTUAL_ENV"):
        monkeypatch.setenv(name, "leaked")
    results = run(tmp_path, "      - run: env\n")
    assert "leaked" not in results[-1].log
    assert "HOME=" in results[-1].log
    assert "/.venv/bin" not in next(line for line in results[-1].log.splitlines() if line.startswith("PATH="))


def test_only_the_named_steps_that_are_chosen_are_run_and_the_others_are_still_read(tmp_path: Path) -> None:
    steps = "      - {name: a, run: echo a}\n      - {name: b, run: echo b}\n"
    results = run(tmp_path, steps, Choice(steps=("b",)))
    assert [(result.name, result.outcome) for result in results[1:]] == [("a", "not chosen"), ("b", "success")]
    with pytest.raises(ExpressionError, match=r"github\.reff is not known"):
        run(tmp_path / "2", "      - {name: a, run: echo a, env: {X: '${{ github.reff }}'}}\n", Choice(steps=("b",)))


@pytest.mark.parametrize(
    ("steps", "seen"),
    [
        ("      - uses: actions/cash@1\n        with: {path: x}\n", "actions/cash: no stand-in for this action"),
        (
            "      - uses: actions/cache@1\n        with: {paths: x}\n",
            "cache: the stand-in does not know the input paths",
        ),
        ("      - uses: actions/cache@1\n        with: {path: x, key: --}\n", "cache: the key is empty"),
        ("      - uses: actions/checkout@1\n", "checkout: persist-credentials is not false"),
        (
            "      - uses: actions/setup-python@1\n        with: {python-version: '3.99'}\n",
            "no python3.99 on this machine",
        ),
        ("      - uses: actions/upload-artifact@1\n        with: {name: n, path: lost/}\n", "nothing at lost/"),
        ("      - {run: echo, shell: fish}\n", "shell fish is not known here"),
    ],
)
def test_what_github_refuses_or_the_stand_ins_do_not_know_fails(tmp_path: Path, steps: str, seen: str) -> None:
    results = run(tmp_path, steps)
    assert results[-1].outcome == "failure"
    assert seen in results[-1].log


def test_a_key_that_is_not_known_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WorkflowError, match="step 2: runs is not known here"):
        run(tmp_path, "      - runs: echo\n")
    with pytest.raises(WorkflowError, match=r"no job two; there are: one"):
        run_job("try", "two", tmp_path / "source", tmp_path / "out", Choice())
    with pytest.raises(WorkflowError, match="no workflow"):
        run_job("tri", "one", tmp_path / "source", tmp_path / "out", Choice())


@pytest.mark.parametrize(
    ("matrix", "jobs"),
    [
        ({}, [{}]),
        ({"python": ["3.11", "3.12"]}, [{"python": "3.11"}, {"python": "3.12"}]),
        ({"a": [1, 2], "b": [3]}, [{"a": 1, "b": 3}, {"a": 2, "b": 3}]),
        ({"include": [{"variant": "cpu"}, {"variant": "cuda"}]}, [{"variant": "cpu"}, {"variant": "cuda"}]),
    ],
)
def test_a_matrix_is_its_combinations(matrix: dict[str, list[object]], jobs: list[dict[str, object]]) -> None:
    assert combinations({"strategy": {"matrix": matrix}}) == jobs
