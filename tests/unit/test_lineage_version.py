"""`make lineage VERSION=`: a registered version names its commit, its data and the hashes of its files."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest
from lineage_repository import DIGEST, PROVENANCE, commit, make_repository, shown, write_gguf

from finetune import origin


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


def test_a_registered_version_names_the_same(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hash_of_commit = commit(repository, "Train")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    run = client.create_run(client.create_experiment("x", artifact_location=str(tmp_path / "artifacts")))
    client.log_param(run.info.run_id, "seed", "42")
    client.create_registered_model("finetune-smoke")
    tags = {"git.commit": hash_of_commit, "git.dirty": "false", "recipe": "smoke", "base.kind": "scratch"}
    tags |= {"licenses": '["MIT"]', "data_sha256": DIGEST, "gguf_sha256": "4" * 64, "package.torch": "2.13.0"}
    client.create_model_version("finetune-smoke", str(tmp_path), run.info.run_id, tags=tags)
    client.set_registered_model_alias("finetune-smoke", "challenger", "1")
    text = shown(capsys, "--version", "finetune-smoke@challenger")
    assert shown(capsys, "--version", "finetune-smoke/1") == text
    for line in (
        "finetune-smoke version 1",
        "base        a model made from scratch, by these parameters",
        f"GGUF files  {'4' * 64}",
        "  seed  42",
        "make it again beside this tree, and compare every out: make rebuild VERSION=finetune-smoke/1",
        f"    git checkout {hash_of_commit}",
        f'    echo "{"3" * 64}  models/gguf/model-F16.gguf" | sha256sum --check',
    ):
        assert line in text.splitlines()
    client.set_model_version_tag("finetune-smoke", "1", "git.dirty", "true")
    assert "CHANGED beside this commit when it was registered" in shown(capsys, "--version", "finetune-smoke/1")
    client.set_model_version_tag("finetune-smoke", "1", "git.commit", "f" * 40)
    assert f"commit      {'f' * 40}  (not in this clone: git fetch --all)" in shown(
        capsys, "--version", "finetune-smoke/1"
    )
    client.set_model_version_tag("finetune-smoke", "1", "git.commit", "--output=x")
    text = shown(capsys, "--version", "finetune-smoke/1")
    assert "commit      none of this repository records it" in text
    assert "--output" not in text
    assert origin.main(["--version", "finetune-smoke"]) == 1
    assert "a version is name@alias or name/number" in capsys.readouterr().err
    assert origin.main(["--version", "finetune-smoke@champion"]) == 1
    assert "alias champion" in capsys.readouterr().err
