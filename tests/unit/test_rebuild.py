"""`make rebuild`: a version computed again beside the user's tree, compared out by out, and what cannot be refused."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlflow
import pytest
from lineage_repository import git
from mirror_runs import make_database
from rebuilt_repository import Repository, environment, make_repository, run

from finetune import rebuild
from finetune.lineage import lock_sha256
from finetune.reproduction import read_processor
from finetune.tracking.promotion import NOTE
from finetune.tracking.rebuilt import noted

TREE = ".cache/rebuild/finetune-smoke-1"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    folder = tmp_path_factory.mktemp("repository")
    return make_repository(folder / "repository", f"sqlite:///{make_database(folder)}")


def run_cache(repository: Repository) -> list[str]:
    return sorted(str(path) for path in (repository.folder / ".dvc/cache").rglob("*") if path.is_file())


def verdict(lines: list[str], stage: str, out: str) -> str:
    """What the table says of an out, behind its two hashes."""
    (words,) = [line.split() for line in lines if line.split()[:2] == [stage, out]]
    return " ".join(words[4:])


def test_equal_bytes_are_shown_out_by_out_and_nothing_of_the_users_is_touched(repository: Repository) -> None:
    (repository.folder / "make.py").write_text("# half written\n")
    before = run_cache(repository)
    done = run(repository, "finetune-smoke@champion")
    assert done.returncode == 0, done.stdout + done.stderr
    half_written = (repository.folder / "make.py").read_text()
    git(repository.folder, "checkout", "--", "make.py")
    assert half_written == "# half written\n"
    lines = done.stdout.splitlines()
    assert verdict(lines, "fetch", "data/raw") == "taken from the cache"
    assert verdict(lines, "train_qlora", "models/gguf") == "equal"
    assert "rebuilt: all 9 outs and" in done.stdout
    # fetch did not run, the others did.
    assert [line for line in lines if line.startswith("Running stage")] == [
        "Running stage 'clean':",
        "Running stage 'train_qlora':",
    ]
    assert run_cache(repository) == before
    assert not (repository.folder / TREE).exists()
    assert len(git(repository.folder, "worktree", "list").splitlines()) == 1
    entry = version_of(repository)
    assert (entry.tags["rebuild.equal"], entry.tags["rebuild.processor"]) == ("true", read_processor()[0])
    assert entry.tags["rebuild.outcome"].startswith("all 9 outs and ")
    assert re.match(
        r"Rebuilt on 2\d{3}-.* UTC: all 9 outs and \d+ tags are equal \(computed from clean on\), on ",
        entry.description,
    )


def version_of(repository: Repository) -> Any:
    return mlflow.MlflowClient(repository.uri).get_model_version("finetune-smoke", "1")


def test_the_line_of_a_rebuild_replaces_an_older_one_and_stays_below_the_decision() -> None:
    now = datetime(2026, 11, 21, 9, 5, tzinfo=UTC)
    decision = "Promoted on 2026-11-20 10:00 UTC: better\n\n"
    first = noted(f"{decision}the page\n", "2 of 9 outs differ, on A", now)
    assert first == f"{decision}Rebuilt on 2026-11-21 09:05 UTC: 2 of 9 outs differ, on A\n\nthe page\n"
    second = noted(first, "all 9 outs are equal, on B", now)
    assert second == f"{decision}Rebuilt on 2026-11-21 09:05 UTC: all 9 outs are equal, on B\n\nthe page\n"
    assert NOTE.sub("", second).startswith("Rebuilt on")
    assert NOTE.sub("", NOTE.sub("", second)).startswith("Rebuilt on")


def test_other_bytes_are_named_with_the_machine_and_stay_out_of_the_users_cache(repository: Repository) -> None:
    before = run_cache(repository)
    done = run(repository, "finetune-smoke/1", "--from", "train_qlora", "--keep", NOISE="another card")
    assert done.returncode == 1
    assert "NOT rebuilt: 5 of 9 outs differ" in done.stdout
    assert verdict(done.stdout.splitlines(), "train_qlora", "models/gguf") == "DIFFERENT"
    assert "tag gguf_sha256: DIFFERENT" in done.stdout
    assert "tag data_sha256: equal" in done.stdout
    assert "AVX2" in done.stdout
    assert version_of(repository).tags["rebuild.equal"] == "false"
    assert version_of(repository).tags["rebuild.outcome"] == "5 of 9 outs differ (computed from train_qlora on)"
    assert run_cache(repository) == before
    assert (repository.folder / TREE / "models/gguf/Modelfile").read_text().endswith("another card")
    # The kept tree is that of the same version and stages: its results are what is compared again.
    again = run(repository, "finetune-smoke/1", "--from", "train_qlora")
    assert again.returncode == 1
    assert "Running stage" not in again.stdout
    assert not (repository.folder / TREE).exists()


def test_an_interrupted_rebuild_goes_on_where_it_was(repository: Repository, tmp_path: Path) -> None:
    started, go = tmp_path / "started", tmp_path / "go"
    variables = environment(repository.folder, repository.uri, STARTED=str(started), WAIT=str(go))
    command = [sys.executable, "-m", "finetune.rebuild", "finetune-smoke/1"]
    process = subprocess.Popen(
        command, cwd=repository.folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    until_s = time.monotonic() + 120
    while not started.exists() and time.monotonic() < until_s:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    said = process.communicate(timeout=120)[0]
    assert (process.returncode, "`make rebuild VERSION=finetune-smoke/1` goes on" in said) == (75, True), said
    go.touch()
    done = run(repository, "finetune-smoke/1", STARTED=str(started), WAIT=str(go))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on in" in done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("Running stage")] == [
        "Running stage 'train_qlora':"
    ]


def test_a_version_of_parameters_that_were_not_committed_is_rebuilt_with_them(repository: Repository) -> None:
    lock = (repository.folder / "dvc.lock").read_text()
    params = repository.folder / "params.yaml"
    params.write_text("seed: 42\n# tried\n")
    name = repository.add_version({"git.dirty": "true"}, {})
    git(repository.folder, "checkout", "--", "params.yaml")
    done = run(repository, name, "--from", "train_qlora")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "params.yaml is the run's: the commit has another one" in done.stderr
    assert (repository.folder / "dvc.lock").read_text() == lock


def refusal(repository: Repository, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *named: str) -> str:
    patch.setenv("DVC_ROOT", str(repository.folder))
    patch.setenv("MLFLOW_TRACKING_URI", repository.uri)
    assert rebuild.main(named) == 1
    streams = capsys.readouterr()
    assert streams.out == ""
    return streams.err


def test_what_cannot_be_rebuilt_is_refused_with_the_reason(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = (repository.folder / "dvc.lock").read_text()
    code = lock.split("path: make.py")[1].split("md5: ")[1].split()[0]
    cases = [
        ({"git.commit": "none"}, lock, "was registered outside git: no commit holds the code"),
        ({"git.commit": "--output=x"}, lock, "was registered outside git"),
        ({"git.commit": "f" * 40}, lock, f"commit {'f' * 40} of finetune-smoke version"),
        ({}, lock.replace(code, "f" * 32), "was made from what its commit does not hold: make.py"),
        # YAML reads digits as a number.
        ({}, lock.replace(code, "0" * 32), "holds something else than stages with paths and hashes"),
        ({}, lock.replace("make.py train", "make.py train --fast"), "its commit does not hold: dvc.yaml: train_qlora"),
        ({}, lock.replace("seed: 42", "seed: 43"), "its commit does not hold: params.yaml: seed"),
        ({}, lock.replace("path: make.py", "path: never_added.py"), "its commit does not hold: never_added.py"),
        ({"dvc_lock_sha256": "1" * 64}, lock, "is not the one in its tags"),
        ({"dvc_lock_sha256": "none"}, lock, "has no tag dvc_lock_sha256 that is a SHA-256"),
        ({}, lock + "a: &a [x]\nb: *a\n", "holds YAML aliases, which DVC does not write"),
        ({}, lock + "\x00", "cannot be read"),
    ]
    for tags, text, reason in cases:
        (tmp_path / "dvc.lock").write_text(text)
        if "dvc_lock_sha256" not in tags and "\x00" not in text:
            tags = {**tags, "dvc_lock_sha256": lock_sha256(tmp_path / "dvc.lock")}
        name = repository.add_version(tags, {"dvc.lock": text})
        assert reason in refusal(repository, monkeypatch, capsys, name)
    assert "there is no stage 'trane'" in refusal(
        repository, monkeypatch, capsys, "finetune-smoke/1", "--from", "trane"
    )
    assert list((repository.folder / ".cache").glob("rebuild/*")) == []


def test_another_environment_is_refused_with_the_packages_that_differ(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pins = repository.folder / "requirements/data.txt"
    kept = pins.read_text()
    pins.write_text("numpy==1.0\nno-such-package==2.0\n")
    git(repository.folder, "commit", "--quiet", "--all", "--message", "Other pins")
    name = repository.add_version({"git.commit": git(repository.folder, "rev-parse", "HEAD")}, {})
    message = refusal(repository, monkeypatch, capsys, name)
    assert "not 1.0; no-such-package is missing, not 2.0" in message
    assert "remedy: git worktree add ../rebuild" in message
    pins.write_text(kept)
