from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from finetune.errors import DataError, TrackingError
from finetune.io import write_json, write_text
from finetune.lineage import (
    figure,
    flatten,
    git_tags,
    lock_sha256,
    new_source,
    quantized_types,
    read_curves,
    read_datasets,
    read_metrics,
    run_params,
    shown_uri,
    tracking_uri,
    without_passwords,
)
from finetune.params import load_params

SMOKE = Path(__file__).parents[2] / "recipes/smoke/params.yaml"


def git(root: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    for name in ("code.py", "metrics/clean.json", "dvc.lock"):
        write_text(tmp_path / name, "1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def test_flatten_counts_tables_and_keeps_plain_lists_whole() -> None:
    nested = {"a": {"b": 1, "c": ["x", "y"]}, "d": [{"e": None}, {"e": True}], "f": []}
    assert flatten(nested) == {"a.b": 1, "a.c": '["x", "y"]', "d.0.e": None, "d.1.e": True, "f": "[]"}


def test_params_leave_register_out_and_cut_a_text_that_mlflow_would_refuse(tmp_path: Path) -> None:
    assert run_params(load_params(SMOKE))["train_qlora.lora.alpha"] == "64"
    assert not [key for key in run_params(load_params(SMOKE)) if key.startswith(("register", "registration"))]
    write_text(tmp_path / "params.yaml", SMOKE.read_text().replace("Tu es l'assistant", "z" * 7000))
    long = run_params(load_params(tmp_path / "params.yaml"))["ollama_modelfile.system"]
    assert (len(long), long[5900:5914]) == (5977, " ... SHA-256 " + long[5913])


def test_metrics_are_numbers_by_stage(tmp_path: Path) -> None:
    write_json(tmp_path / "clean.json", {"kept": 3, "by_source": {"a": {"kept": 1.5}}, "note": "x", "pure": True})
    write_json(tmp_path / "split.json", {"rows": {"train": 2}, "none": None, "stops": ["</s>"]})
    assert read_metrics(tmp_path) == {"clean.kept": 3.0, "clean.by_source.a.kept": 1.5, "split.rows.train": 2.0}


def test_no_metrics_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no metrics"):
        read_metrics(tmp_path)


def test_curves_leave_empty_cells_out(tmp_path: Path) -> None:
    write_text(tmp_path / "log.csv", "step,train_loss,validation_loss\n1,2.5,\n2,2.0,2.25\n")
    assert read_curves(tmp_path / "log.csv") == {
        1: {"train_loss": 2.5},
        2: {"train_loss": 2.0, "validation_loss": 2.25},
    }


@pytest.mark.parametrize("content", ["train_loss\n2.0\n", "step,train_loss\n1,high\n"])
def test_a_log_without_steps_or_numbers_is_an_error(tmp_path: Path, content: str) -> None:
    write_text(tmp_path / "log.csv", content)
    with pytest.raises(DataError, match="not a training log"):
        read_curves(tmp_path / "log.csv")


def test_a_dataset_digest_follows_content_not_order(tmp_path: Path) -> None:
    files = [{"path": name, "sha256": name * 64, "size_bytes": 5} for name in "ab"]
    digests = []
    for order in (files, files[::-1], files[:1]):
        source = {"name": "chat", "license": "MIT", "origin": {"kind": "local"}, "revision": None, "files": order}
        write_json(tmp_path / "manifest.json", {"sources": [source]})
        (facts,) = read_datasets(tmp_path / "manifest.json")
        digests.append(facts.sha256)
    assert digests[0] == digests[1] != digests[2]
    assert facts.profile == '{"files": 1, "size_bytes": 5}'


def test_the_lock_hash_ignores_register_and_order_only(tmp_path: Path) -> None:
    lock = tmp_path / "dvc.lock"
    hashes = []
    for stages in (
        "  a: {cmd: x}\n  b: {cmd: y}\n",
        "  b: {cmd: y}\n  a: {cmd: x}\n  register: {cmd: z}\n",
        "  a: {cmd: x}\n",
    ):
        write_text(lock, "schema: '2.0'\nstages:\n" + stages)
        hashes.append(lock_sha256(lock))
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_missing_lock_says_what_makes_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="dvc repro"):
        lock_sha256(tmp_path / "dvc.lock")


def test_only_what_the_pipeline_writes_may_differ_in_a_clean_tree(repository: Path) -> None:
    generated = (Path("metrics"), Path("dvc.lock"))
    write_text(repository / "metrics/clean.json", "2\n")
    write_text(repository / "dvc.lock", "2\n")
    tags = git_tags(repository, generated)
    assert tags["git.dirty"] == "false"
    assert len(tags["git.commit"]) == 40
    write_text(repository / "code.py", "2\n")
    assert git_tags(repository, generated)["git.dirty"] == "true"


def test_a_new_file_makes_the_tree_dirty(repository: Path) -> None:
    write_text(repository / "new.py", "")
    assert git_tags(repository, ())["git.dirty"] == "true"


def test_a_folder_without_git_and_one_without_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_tags(tmp_path, ()) == {"git.commit": "none", "git.dirty": "none"}
    git(tmp_path, "init", "-q")
    assert git_tags(tmp_path, ()) == {"git.commit": "none", "git.dirty": "false"}


def test_a_git_that_refuses_is_not_taken_for_no_git(repository: Path) -> None:
    write_text(repository / ".git/config", "[broken\n")
    with pytest.raises(TrackingError, match="git failed"):
        git_tags(repository, ())


def test_a_missing_figure_names_file_and_stage() -> None:
    with pytest.raises(DataError, match=r"rows\.train is missing(.|\n)*metrics/split\.json(.|\n)*single-item split"):
        figure({"split.rows.test": 1.0}, "split.rows.train")


def test_gguf_types_come_largest_first() -> None:
    sizes = {"Q4_K_M": 3.0, "F16": 9.0, "Q8_0": 5.0}
    metrics = {f"quantize_gguf.types.{name}.size_bytes": size for name, size in sizes.items()}
    assert quantized_types({"clean.size_bytes": 1.0, **metrics}) == ["F16", "Q8_0", "Q4_K_M"]


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://localhost:5000", "http://localhost:5000"),
        ("http://ann:hunter2@host:5000", "http://***@host:5000"),
        ("postgresql://ann:hun/t@er2@host/db", "postgresql://***@host/db"),
        (
            "postgresql://host/db?user=ann&password=hunter2&sslmode=require",
            "postgresql://host/db?user=ann&password=***&sslmode=require",
        ),
        ("API request to http://ann:hunter2@host/api failed", "API request to http://***@host/api failed"),
    ],
)
def test_an_address_is_shown_without_its_password(address: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert shown_uri() == without_passwords(address) == shown


CLEAN = {"git.commit": "b", "git.dirty": "false", "dvc_lock_sha256": "2"}


@pytest.mark.parametrize(("known", "taken"), [("true", True), ("none", True), ("false", False)])
def test_a_clean_source_replaces_one_with_changes_only(known: str, taken: bool) -> None:
    assert new_source({"git.commit": "a", "git.dirty": known}, {**CLEAN, "recipe": "x"}) == (CLEAN if taken else {})


@pytest.mark.parametrize("known", ["true", "none", "false"])
def test_a_source_with_changes_replaces_nothing(known: str) -> None:
    assert new_source({"git.commit": "a", "git.dirty": known}, {**CLEAN, "git.dirty": "true"}) == {}


def test_the_default_database_is_in_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert tracking_uri() == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    assert tracking_uri() == "http://localhost:5000"
