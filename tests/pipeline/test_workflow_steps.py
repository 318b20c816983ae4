"""The workflows' own steps, run on this machine in a clone: what they check, what they write, and that they can fail.

The cheap ones. `make lint`, `make test`, `make repro` and Docker's steps are left to `python scripts/run_workflow.py`
(docs/ci.md), which runs the whole of a job: `make test` inside `make test` would not end.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from clone import ROOT, clone, git

sys.path.insert(0, str(ROOT / "scripts"))

from ci_summary import compared
from run_workflow import Result, run_job
from workflow_contexts import Choice, combinations, load

pytestmark = [pytest.mark.pipeline, pytest.mark.skipif(not (ROOT / ".venv").is_dir(), reason="no .venv: make setup")]
CHECKED = (
    "needs.check.outputs.image=ghcr.io/owner/repository",
    "needs.check.outputs.version=0.1.0",
    "steps.build.outputs.digest=sha256:0",
    "steps.names.outputs.image=i",
    "steps.names.outputs.version=0.1.0",
)
EVERY_JOB = [
    ("audit", "audit"),
    ("ci", "lint"),
    ("ci", "lock"),
    ("ci", "smoke"),
    ("ci", "test"),
    ("gpu", "train"),
    ("image", "build"),
    ("image", "check"),
    ("release", "check"),
    ("release", "image"),
    ("release", "release"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This tree as a commit, then with another parameter, then with the parameter back and another metric."""
    folder = clone(tmp_path_factory.mktemp("source"))
    text = (folder / "params.yaml").read_text(encoding="utf-8")
    (folder / "params.yaml").write_text(text.replace("warmup_share: 0.05", "warmup_share: 0.1"), encoding="utf-8")
    git(folder, "commit", "--all", "--quiet", "--message", "changed")
    (folder / "params.yaml").write_text(text, encoding="utf-8")
    metrics = folder / "metrics/evaluate.json"
    content = json.loads(metrics.read_text(encoding="utf-8"))
    metrics.write_text(json.dumps({**content, "perplexity_ratio": 0.125}), encoding="utf-8")
    git(folder, "commit", "--all", "--quiet", "--message", "changed back, and a metric")
    return folder


def here(steps: tuple[str, ...], *values: str, env: tuple[str, ...] = (), programs: Path | None = None) -> Choice:
    return Choice(steps=steps, values=values, env=env, first_on_path=programs, set_up=False)


def outcomes(results: list[Result]) -> dict[str, str]:
    return {result.name: result.outcome for result in results if result.outcome != "not chosen"}


@pytest.mark.parametrize(("workflow", "job"), EVERY_JOB, ids=[f"{name}-{job}" for name, job in EVERY_JOB])
def test_every_expression_input_and_condition_of_a_job_is_known(
    source: Path, tmp_path: Path, workflow: str, job: str
) -> None:
    for number, combination in enumerate(combinations(load(workflow, source)["jobs"][job])):
        matrix = tuple(f"{key}={value}" for key, value in combination.items())
        choice = Choice(steps=("none",), matrix=matrix, values=CHECKED, set_up=False)
        results = run_job(workflow, job, source, tmp_path / str(number), choice)
        assert {result.outcome for result in results} <= {"success", "not chosen", "left out", "skipped"}


def test_a_set_up_in_the_clone_cannot_reach_the_environment_that_the_steps_share(source: Path, tmp_path: Path) -> None:
    run_job("ci", "lock", source, tmp_path / "job", here(("none",)))
    shared = tmp_path / "job/workspace/.venv"
    assert [file for file in (shared, *shared.rglob("*")) if file.is_symlink()] == []
    before = (ROOT / ".venv/pyvenv.cfg").stat().st_mtime_ns
    subprocess.run([str(shared / "bin/python"), "-m", "venv", str(shared)], check=True)
    assert (ROOT / ".venv/pyvenv.cfg").stat().st_mtime_ns == before


def test_the_documented_command_runs_a_job_and_says_what_became_of_its_steps(source: Path, tmp_path: Path) -> None:
    (line,) = [line for line in (ROOT / "docs/ci.md").read_text("utf-8").splitlines() if line.endswith("--no-setup")]
    program, *words = line.split()
    assert (program, words[0]) == ("python", "scripts/run_workflow.py")
    command = [sys.executable, *words, "--source", str(source), "--out", str(tmp_path / "job"), "--step", "none"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    shown = [line.split()[0] for line in done.stdout.splitlines() if " s  " in line]
    assert shown == ["success", "success", "not", "not"]
    done = subprocess.run([*command[:3], "none", *command[4:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, "run_workflow: no job none" in done.stdout) == (1, True)


def test_every_job_is_tried() -> None:
    found = [
        (file.stem, job) for file in (ROOT / ".github/workflows").iterdir() for job in load(file.stem, ROOT)["jobs"]
    ]
    assert sorted(found) == sorted(EVERY_JOB)


def test_the_lock_check_needs_no_data_and_names_the_stage_that_a_changed_parameter_makes_stale(
    source: Path, tmp_path: Path
) -> None:
    for name, commit in (("same", "HEAD~2"), ("changed", "HEAD~1")):
        git(tmp_path, "clone", "--quiet", str(source), name)
        git(tmp_path / name, "checkout", "--quiet", commit)
    results = run_job("ci", "lock", tmp_path / "same", tmp_path / "job", here(()))
    assert outcomes(results)["check dvc.lock"] == "success", results[-1].log
    assert not (tmp_path / "job/workspace/models").exists()
    results = run_job("ci", "lock", tmp_path / "changed", tmp_path / "other", here(()))
    assert outcomes(results)["check dvc.lock"] == "failure"
    assert "lock-check: dvc.lock is not that of this tree" in results[-1].log
    assert "would run: train_qlora" in results[-1].log


def test_the_summary_shows_what_changed_the_curves_and_the_pipeline(source: Path, tmp_path: Path) -> None:
    choice = here(("summary",), "steps.upload.outputs.artifact-url=https://example.org/1")
    results = run_job("ci", "smoke", source, tmp_path / "job", choice)
    assert outcomes(results)["summary"] == "success", results[-1].log
    page = (tmp_path / "job/summary.md").read_text(encoding="utf-8")
    assert "[Metrics, plots and pages](https://example.org/1)" in page
    parameters, metrics = page.split("### Metrics that differ from HEAD^")
    assert "train_qlora.warmup_share" in parameters
    assert "| 0.1 " in parameters
    assert "perplexity_ratio" in metrics.split("### Plots")[0]
    assert page.count("xychart-beta") == 4
    assert "<details><summary>train_qlora</summary>" in page
    assert "flowchart" in page
    assert len(page.encode()) < 1 << 20


def test_a_summary_of_no_change_and_of_no_earlier_commit_says_so(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(source)
    same = "\n".join(compared("HEAD"))
    assert same == "### Params that differ from HEAD\n\nNone.\n\n### Metrics that differ from HEAD\n\nNone.\n"
    assert compared("HEAD~9") == ["There is no HEAD~9 to compare with."]


def test_the_plots_are_drawn_and_uploaded_and_what_is_missing_is_named(source: Path, tmp_path: Path) -> None:
    results = run_job("ci", "smoke", source, tmp_path / "job", here(("plots", "upload the run")))
    assert outcomes(results)["plots"] == "success"
    assert (tmp_path / "job/artifacts/smoke/dvc_plots/index.html").is_file()
    assert (tmp_path / "job/artifacts/smoke/metrics/evaluate.json").is_file()
    # Nothing was trained in this clone.
    assert results[-2].log == "upload-artifact: nothing at report/, models/ollama/"


def test_bytes_that_differ_from_the_committed_ones_fail_the_job(source: Path, tmp_path: Path) -> None:
    name = "the committed bytes came out again"
    (script,) = [step["run"] for step in load("ci", source)["jobs"]["smoke"]["steps"] if step.get("name") == name]
    assert outcomes(run_job("ci", "smoke", source, tmp_path / "job", here((name,))))[name] == "success"
    workspace = tmp_path / "job/workspace"
    (workspace / "metrics/evaluate.json").write_text("{}\n")
    done = subprocess.run(["bash", "-eo", "pipefail", "-c", script], cwd=workspace, capture_output=True, check=False)
    assert done.returncode == 1


def pretended(folder: Path, program: str, said: str, code: int = 0) -> Path:
    """A folder with a program that says something and ends with an exit code."""
    folder.mkdir()
    (folder / program).write_text(f'#!/bin/sh\nprintf "%b\\n" "{said}"\nexit {code}\n')
    (folder / program).chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        ("Data and pipelines are up to date.", "success"),
        ("Running stage 'merge':\\nData and pipelines are up to date.", "failure"),
        ("", "failure"),
    ],
)
def test_a_second_run_that_runs_a_stage_fails_the_job(source: Path, tmp_path: Path, said: str, outcome: str) -> None:
    name = "again, where nothing may run"
    programs = pretended(tmp_path / "programs", "make", said)
    assert outcomes(run_job("ci", "smoke", source, tmp_path / "job", here((name,), programs=programs)))[name] == outcome


@pytest.mark.parametrize(("code", "outcome"), [(0, "success"), (1, "failure")])
def test_the_tests_exit_code_survives_the_pipe_and_their_last_lines_are_shown(
    source: Path, tmp_path: Path, code: int, outcome: str
) -> None:
    programs = pretended(tmp_path / "programs", "make", "first\\n== short test summary info\\n== 3 passed", code)
    results = run_job("ci", "test", source, tmp_path / "job", here((), programs=programs))
    assert (outcomes(results)["test"], outcomes(results)["summary"]) == (outcome, "success")
    page = (tmp_path / "job/summary.md").read_text(encoding="utf-8")
    assert page == "### Tests on Python 3.11\n```\n== short test summary info\n== 3 passed\n```\n"


class Osv(BaseHTTPRequestHandler):
    """OSV's query address: one planted fault of Jinja2, none of anything else (https://google.github.io/osv.dev)."""

    planted = True
    asked: tuple[str, ...] = ()

    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked = (*self.asked, query["package"]["name"])
        answer: dict[str, Any] = {}
        if self.planted and query["package"]["name"] == "jinja2":
            events = [{"introduced": "0"}, {"fixed": "99.0"}]
            ranges = [{"type": "ECOSYSTEM", "events": events}]
            package = {"name": "jinja2", "ecosystem": "PyPI"}
            affected = [{"package": package, "ranges": ranges, "versions": [query["version"]]}]
            answer = {"vulns": [{"id": "PYSEC-0000-1", "aliases": ["CVE-0000-1"], "affected": affected}]}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def osv() -> Iterator[str]:
    Osv.asked = ()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Osv)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/query"
    server.shutdown()


def test_the_audit_asks_for_every_locked_package_and_names_the_planted_fault(
    source: Path, tmp_path: Path, osv: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = [line for line in (ROOT / "requirements/lock.txt").read_text().splitlines() if "==" in line]
    results = run_job("audit", "audit", source, tmp_path / "bad", here((), env=(f"OSV_URL={osv}",)))
    assert outcomes(results)["audit"] == "failure"
    assert len(Osv.asked) == len(set(Osv.asked)) == len(locked)
    page = (tmp_path / "bad/summary.md").read_text(encoding="utf-8")
    assert "jinja2 3.1.6: PYSEC-0000-1, CVE-0000-1; mended by 99.0" in page
    assert f"audit: {len(locked)} packages of requirements/lock.txt, 1 known vulnerabilities" in page
    monkeypatch.setattr(Osv, "planted", False)
    results = run_job("audit", "audit", source, tmp_path / "good", here((), env=(f"OSV_URL={osv}",)))
    assert outcomes(results)["audit"] == "success"


def test_a_tag_that_is_not_the_version_is_refused(source: Path, tmp_path: Path) -> None:
    name = "the tag is the version of pyproject.toml"
    results = run_job("release", "check", source, tmp_path / "bad", here((name,), "github.ref_name=v9.9.9", *CHECKED))
    assert outcomes(results)[name] == "failure"
    assert "tag v9.9.9, but pyproject.toml says 0.1.0" in next(result.log for result in results if result.name == name)
    good = here((name,), "github.ref_name=v0.1.0", *CHECKED)
    results = run_job("release", "check", source, tmp_path / "good", good)
    assert outcomes(results)[name] == "success"
    assert (tmp_path / "good/files/2/OUTPUT").read_text() == "version=0.1.0\nimage=ghcr.io/owner/repository\n"


def test_a_release_holds_source_bill_of_materials_lock_and_their_checksums(source: Path, tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "gh").write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$RUNNER_TEMP/gh"\n')
    (programs / "gh").chmod(0o755)
    values = ("github.ref_name=v0.1.0", *CHECKED)
    results = run_job("release", "release", source, tmp_path / "job", here((), *values, programs=programs))
    assert [result.name for result in results if result.outcome == "failure"] == []
    folder = tmp_path / "job/workspace/build/release"
    files = ["finetune-0.1.0-lock.txt", "finetune-0.1.0.cdx.json", "finetune-0.1.0.tar.gz"]
    assert sorted(file.name for file in folder.iterdir()) == ["SHA256SUMS", *files]
    checked = subprocess.run(
        ["sha256sum", "--check", "SHA256SUMS"], cwd=folder, capture_output=True, text=True, check=True
    )
    assert checked.stdout.splitlines() == [f"{name}: OK" for name in files]
    with tarfile.open(folder / "finetune-0.1.0.tar.gz") as archive:
        assert {"finetune-0.1.0/dvc.lock", "finetune-0.1.0/Makefile"} <= set(archive.getnames())
    told = (tmp_path / "job/temp/gh").read_text().splitlines()
    assert told[:5] == ["release", "create", "v0.1.0", "--repo", "owner/Repository"]
    assert told[-4:] == [f"build/release/{name}" for name in ("SHA256SUMS", *files)]
