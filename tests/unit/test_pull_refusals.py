"""What a hostile registry or remote could send to `make pull`, with tags that fit: refused, and nothing is written."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from mirror_runs import make_database
from registered_files import (
    NAME,
    REFERENCE,
    UPLOADED,
    Registered,
    make_clone,
    make_registry,
    md5,
    object_path,
    use_clone,
)

from finetune import pull
from finetune.errors import DataError, TrackingError
from finetune.io import sha256_tree, write_text
from finetune.lineage import lock_sha256
from finetune.tracking.versions import download, find_version, list_files
from finetune.transfer.limits import require_room


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Registered:
    folder = tmp_path_factory.mktemp("registry")
    return make_registry(folder, f"sqlite:///{make_database(folder)}")


@pytest.fixture(autouse=True)
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registered: Registered) -> Path:
    folder = make_clone(tmp_path / "clone", registered.remote)
    use_clone(folder, registered, monkeypatch)
    return folder


def refusal(capsys: pytest.CaptureFixture[str], name: str) -> str:
    assert pull.main([name]) == 1
    pulled = Path("models/pulled")
    assert not pulled.exists() or list(pulled.iterdir()) == []
    return capsys.readouterr().err


def add_version(registered: Registered, ollama: Path, lock: str | None = None, **changes: str) -> str:
    """A version of the GGUF files of the others, with the tags of these files: its maker has written both."""
    client = registered.client
    tags = dict(client.get_model_version(NAME, "1").tags) | {"ollama_sha256": sha256_tree(ollama)} | changes
    run_id = client.create_run(client.get_experiment_by_name("x").experiment_id).info.run_id
    client.log_artifacts(run_id, str(ollama), "ollama")
    client.log_text(run_id, lock or registered.artifact(REFERENCE, "dvc.lock").read_text(), "dvc.lock")
    return f"{NAME}/{client.create_model_version(NAME, 'x', run_id, tags=tags).version}"


def ollama_files(registered: Registered, folder: Path) -> Path:
    """A copy of the honest version's Modelfile and template."""
    for name in ("Modelfile", "template.gotmpl"):
        write_text(folder / name, (registered.outs / "ollama" / name).read_text())
    return folder


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("FROM ../gguf/model-Q8_0.gguf", "FROM /etc/passwd", "FROM names '/etc/passwd', where this pipeline writes"),
        ("FROM ../gguf/model-Q8_0.gguf", "FROM llama3", "FROM names 'llama3'"),
        ("FROM ../gguf/model-Q8_0.gguf", "FROM ../gguf/../../x/model-Q8_0.gguf", "FROM names"),
        ("SYSTEM", "FROM ../gguf/model-Q8_0.gguf\nSYSTEM", "FROM does not stand alone on one line"),
        ("SYSTEM", "ADAPTER /home/ann/.ssh/id\nSYSTEM", "ADAPTER is not written by this project"),
    ],
)
def test_a_modelfile_that_names_something_else(
    registered: Registered, tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, reason: str
) -> None:
    ollama = ollama_files(registered, tmp_path / "ollama")
    write_text(ollama / "Modelfile", (ollama / "Modelfile").read_text().replace(old, new))
    assert reason in refusal(capsys, add_version(registered, ollama))


def test_other_files_other_texts_and_missing_tags(
    registered: Registered, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ollama = ollama_files(registered, tmp_path / "ollama")
    assert "Modelfile is not the file of finetune-smoke version" in refusal(
        capsys, add_version(registered, ollama, modelfile_sha256="0" * 64)
    )
    assert "Modelfile and template.gotmpl are not those of" in refusal(
        capsys, add_version(registered, ollama, ollama_sha256="0" * 64)
    )
    for tag in ("", "none", "0" * 63, "../../x"):
        assert "has no tag gguf_sha256 that is a SHA-256" in refusal(
            capsys, add_version(registered, ollama, gguf_sha256=tag)
        )
    write_text(ollama / "install.sh", "rm -rf ~")
    assert "where Modelfile and template.gotmpl are expected" in refusal(capsys, add_version(registered, ollama))


def test_a_list_of_dvcs_that_leads_out_of_the_folder(
    registered: Registered, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ollama = ollama_files(registered, tmp_path / "ollama")
    honest = registered.artifact(REFERENCE, "dvc.lock").read_text()
    locked = next(line for line in honest.split() if line.rstrip(",}").endswith(".dir")).rstrip(",}")
    for entries in (
        [{"md5": md5(b"x"), "relpath": "../../.bashrc"}],
        [{"md5": "../../../etc/passwd", "relpath": "model-Q8_0.gguf"}],
        {"relpath": 1},
    ):
        content = json.dumps(entries).encode()
        target = object_path(registered.remote, f"{md5(content)}.dir")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        lock = honest.replace(locked, target.parent.name + target.name)
        (tmp_path / "dvc.lock").write_text(lock)
        name = add_version(registered, ollama, lock, dvc_lock_sha256=lock_sha256(tmp_path / "dvc.lock"))
        assert "DVC's list of the GGUF files of finetune-smoke version" in refusal(capsys, name)
    name = add_version(registered, ollama, honest.replace("nfiles: 2", "nfiles: 3"))
    assert "is not the one in its tags" in refusal(capsys, name)


def test_files_at_an_address_that_would_be_sent_the_password(registered: Registered) -> None:
    client = registered.client
    for scheme in ("http", "mlflow-artifacts", "ftp"):
        experiment = client.create_experiment(scheme, artifact_location=f"{scheme}://evil.example/x")
        run_id = client.create_run(experiment).info.run_id
        number_of = client.create_model_version(NAME, "x", run_id).version
        version = find_version(client, f"{NAME}/{number_of}", "")
        with pytest.raises(TrackingError, match=r"evil\.example, which would be sent your password"):
            list_files(client, version, "ollama")


def test_more_bytes_than_announced_and_a_disk_without_room(registered: Registered, tmp_path: Path) -> None:
    version = find_version(registered.client, UPLOADED, "")
    with pytest.raises(TrackingError, match="has more than the 100 bytes announced"):
        download(registered.client, version, "gguf/model-Q8_0.gguf", tmp_path / "file", 100)
    assert list(tmp_path.glob("*file*")) == []
    with pytest.raises(TrackingError, match="something else than the one file gguf"):
        download(registered.client, version, "gguf", tmp_path / "file", 10**6)
    with pytest.raises(DataError, match="MiB are needed"):
        require_room(tmp_path, 1 << 60)


def test_a_dead_server_is_refused_in_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ann:hunter2@127.0.0.1:9")
    began_s = time.monotonic()
    message = refusal(capsys, REFERENCE)
    assert time.monotonic() - began_s < 15
    assert "remedy: start the server, or correct MLFLOW_TRACKING_URI" in message
    assert "hunter2" not in message
