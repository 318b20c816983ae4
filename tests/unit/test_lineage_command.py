"""`make lineage FILE=`: a recorded GGUF, found again from the file, and what is said when it is not."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from lineage_repository import DIGEST, PROVENANCE, commit, git, later, lock, make_repository, shown, write_gguf

from finetune import origin
from finetune.git_history import find_file, read_commit


@pytest.fixture
def made(tmp_path: Path) -> Path:
    (tmp_path / "elsewhere").mkdir()
    return write_gguf(tmp_path / "elsewhere" / "found.gguf", PROVENANCE)


@pytest.fixture
def repository(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_repository(tmp_path / "repository", made)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "repository"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return tmp_path / "repository"


def test_a_file_found_elsewhere_names_its_commit_and_all_that_made_it(
    repository: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hash_of_commit = commit(repository, "Train the smoke recipe")
    later(repository)
    text = shown(capsys, str(made))
    digest = hashlib.sha256(made.read_bytes()).hexdigest()
    assert text.splitlines()[0].startswith("found.gguf  (0.0 MiB)")
    for line in (
        f"SHA-256     {digest}",
        "recipe      smoke",
        "tree        clean: the commit holds the code, parameters and figures that its dvc.lock names",
        "quantised   Q8_0: perplexity x 1.0012 of merged, first choice 98.7%",
        "base        Qwen/Qwen2.5-0.5B at abcdef",
        "licence     MIT",
        f"adapter     {'1' * 64}",
        "packages    torch 2.13.0",
        f"data        manifest {DIGEST}",
        "  train_qlora.lora.rank  32",
        f"    git checkout {hash_of_commit}",
        f'    echo "{digest}  models/gguf/model-Q8_0.gguf" | sha256sum --check',
    ):
        assert line in text.splitlines()
    assert f"commit      {hash_of_commit}  (" in text
    assert "Train the smoke recipe)" in text
    # What a foreign file holds can neither colour the terminal nor be drawn wrong.
    assert "chats \\xe9\\x1b[31m  training  MIT" in text
    assert "1,234,567  " + DIGEST + "  hub:org/set/*.jsonl at c0ffee" in text
    assert text.isascii()


def test_the_printed_commands_give_the_file_again(
    repository: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit(repository, "Train")
    later(repository)
    commands = shown(capsys, str(made)).split("make it again, and compare:\n")[1]
    run = subprocess.run(["sh", "-e", "-c", commands], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.splitlines()[-1] == "models/gguf/model-Q8_0.gguf: OK"
    (repository / "made.bin").write_bytes(b"other")
    commit(repository, "Other bytes")
    subprocess.run(["rm", "-r", "rebuilt"], cwd=tmp_path, check=True)
    other = commands.replace(commands.split("git checkout ")[1].split()[0], git(repository, "rev-parse", "HEAD"))
    run = subprocess.run(["sh", "-e", "-c", other], cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stdout.splitlines()[-1]) == (1, "models/gguf/model-Q8_0.gguf: FAILED")


def change_code(folder: Path) -> None:
    (folder / "train.py").write_text("# another\n")


def change_params(folder: Path) -> None:
    lock(folder, epochs=6)


@pytest.mark.parametrize(
    ("change", "named"), [(change_code, "train.py"), (change_params, "params.yaml: train_qlora.epochs")]
)
def test_a_commit_that_holds_something_else_than_its_lock_says_so(
    change: Callable[[Path], None], named: str, repository: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(repository)
    commit(repository, "Not what was run")
    assert f"tree        CHANGED: dvc.lock names another content of {named}" in shown(capsys, str(made)).splitlines()


def test_a_clean_commit_is_preferred_to_an_earlier_one_that_is_not(repository: Path, made: Path) -> None:
    (repository / "train.py").write_text("# not what was run\n")
    first = commit(repository, "Too early")
    metrics = repository / "metrics/quantize_gguf.json"
    kept = metrics.read_text()
    later(repository)
    metrics.write_text(kept)
    lock(repository)
    clean = commit(repository, "Clean")
    digest = hashlib.sha256(made.read_bytes()).hexdigest()
    found = find_file(repository, digest)
    assert found is not None
    assert (found.commit, found.changed) == (clean, ())
    early = read_commit(repository, first)
    assert early is not None
    assert early.changed == ("train.py",)


def test_a_commit_of_another_branch_is_found(repository: Path, made: Path) -> None:
    git(repository, "checkout", "--quiet", "-b", "experiment")
    experiment = commit(repository, "On a branch")
    git(repository, "checkout", "--quiet", "-b", "other", "HEAD~1")
    found = find_file(repository, hashlib.sha256(made.read_bytes()).hexdigest())
    assert found is not None
    assert found.commit == experiment


def test_a_file_that_no_commit_records_tells_what_it_holds(
    repository: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(capsys, str(made))
    assert "commit      none of this repository records it" in text.splitlines()
    assert "make it again: no commit is known. Fetch all branches (git fetch --all)" in text
    assert "base        Qwen/Qwen2.5-0.5B at abcdef" in text
    assert "sha256sum" not in text


def refusal(capsys: pytest.CaptureFixture[str], path: Path) -> str:
    assert origin.main([str(path)]) == 1
    streams = capsys.readouterr()
    assert streams.out == ""
    return streams.err


def test_what_is_no_whole_file_of_this_pipeline_is_refused(
    repository: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, whole = tmp_path / "other.gguf", made.read_bytes()
    assert "the GGUF file is missing" in refusal(capsys, other)
    for content, what in (
        (b"", "the file is empty"),
        (b"PK\x03\x04 a zip", "not a GGUF: it begins with b'PK"),
        (whole[:100], "header is cut short or damaged"),
        (whole[:-1], "the GGUF is cut short: its tensors end at byte"),
    ):
        other.write_bytes(content)
        assert what in refusal(capsys, other)
    write_gguf(other, {"general.name": "Llama", "general.organization": "Meta"})
    message = refusal(capsys, other)
    assert "holds no provenance of a finetune pipeline; its general.name is 'Llama', its maker 'Meta'" in message
    assert "remedy: ask its maker" in message


def test_outside_a_repository_it_says_so(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert "not a git repository, so no commit can be found" in refusal(capsys, made)


def test_a_tracked_folder_that_differs_from_dvc_lock_is_named(
    repository: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (repository / "sample/b/c.txt").write_text("changed")
    commit(repository, "Train on other data than dvc.lock says")
    assert "tree        CHANGED: dvc.lock names another content of sample" in shown(capsys, str(made)).splitlines()
