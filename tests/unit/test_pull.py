"""`make pull`: a registered version's files on another machine, from the registry or DVC's remote, and verified."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from mirror_runs import make_database
from registered_files import (
    MODELFILE,
    Q4,
    Q8,
    REFERENCE,
    UPLOADED,
    Registered,
    changed,
    make_clone,
    make_registry,
    md5,
    object_path,
    use_clone,
)

from finetune import pull
from finetune.export.modelfile import read_modelfile

PULLED = Path("models/pulled/finetune-smoke")
BOTH = pytest.mark.parametrize("name", [REFERENCE, UPLOADED])


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Registered:
    folder = tmp_path_factory.mktemp("registry")
    return make_registry(folder, f"sqlite:///{make_database(folder)}")


@pytest.fixture(autouse=True)
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registered: Registered) -> Path:
    folder = make_clone(tmp_path / "clone", registered.remote)
    use_clone(folder, registered, monkeypatch)
    return folder


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert pull.main(arguments) == 1
    streams = capsys.readouterr()
    assert streams.out == ""
    return streams.err


@BOTH
def test_a_version_comes_whole_verified_and_ready_to_serve(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert pull.main([name]) == 0
    found = sorted(file.name for file in PULLED.iterdir())
    assert found == ["Modelfile", "model-Q8_0.gguf", "pulled.json", "template.gotmpl"]
    modelfile, gguf = read_modelfile(PULLED / "Modelfile")
    assert gguf.read_bytes() == Q8
    assert modelfile.from_path == "./model-Q8_0.gguf"
    assert (modelfile.template, modelfile.stops) == (MODELFILE.template, MODELFILE.stops)
    shown = capsys.readouterr().out
    assert f"SHA-256 {hashlib.sha256(Q8).hexdigest()}" in shown
    assert "ollama create finetune-smoke -f models/pulled/finetune-smoke/Modelfile" in shown
    assert [entry.name for entry in PULLED.parent.iterdir()] == ["finetune-smoke"]


def test_an_uploaded_version_needs_no_remote(
    tmp_path: Path, registered: Registered, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(make_clone(tmp_path / "without", None)))
    assert pull.main([UPLOADED]) == 0


@BOTH
def test_a_second_pull_transfers_nothing_and_a_torn_file_is_fetched_again(
    name: str, registered: Registered, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pull.main([name]) == 0
    before = {file.name: file.stat().st_ino for file in PULLED.iterdir()}
    with changed(registered.sources(Q8), None):
        assert pull.main([name]) == 0
        assert "is there already and verifies: left as it is" in capsys.readouterr().err
        assert {file.name: file.stat().st_ino for file in PULLED.iterdir()} == before
    (PULLED / "model-Q8_0.gguf").write_bytes(Q8[:-1])
    assert pull.main([name]) == 0
    assert (PULLED / "model-Q8_0.gguf").read_bytes() == Q8


def test_another_type_takes_the_place_of_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    for quantization, content in (("Q8_0", Q8), ("Q4_K_M", Q4)):
        assert pull.main([UPLOADED, "--type", quantization, "--to", "here"]) == 0
        assert read_modelfile(Path("here/Modelfile"))[1].read_bytes() == content
    assert [file.name for file in Path("here").glob("*.gguf")] == ["model-Q4_K_M.gguf"]
    capsys.readouterr()
    message = refusal(capsys, UPLOADED, "--type", "../../x", "--to", "here")
    assert "has no model-../../x.gguf" in message
    assert "TYPE= one of Q4_K_M, Q8_0" in message
    assert [file.name for file in Path("here").glob("*.gguf")] == ["model-Q4_K_M.gguf"]


@BOTH
def test_wrong_bytes_are_refused_and_the_folder_of_before_stays(
    name: str, registered: Registered, capsys: pytest.CaptureFixture[str]
) -> None:
    with changed(registered.sources(Q8), b"X" + Q8[1:]):
        assert "the GGUF files are not those of finetune-smoke version" in refusal(capsys, name)
        assert list(PULLED.parent.iterdir()) == []
    assert pull.main([name, "--type", "Q4_K_M"]) == 0
    capsys.readouterr()
    # The first pull has proven the hashes of all files: now the wrong one is named.
    with changed(registered.sources(Q8), b"X" + Q8[1:]):
        message = refusal(capsys, name)
        assert "model-Q8_0.gguf is not the file of finetune-smoke version" in message
        assert f"the version's is {hashlib.sha256(Q8).hexdigest()}" in message
    assert (PULLED / "model-Q4_K_M.gguf").read_bytes() == Q4


def test_a_list_of_hashes_that_the_tag_proves_spares_the_other_files(
    registered: Registered, capsys: pytest.CaptureFixture[str]
) -> None:
    types = {kind: {"sha256": hashlib.sha256(content).hexdigest()} for kind, content in (("Q8_0", Q8), ("Q4_K_M", Q4))}
    run_id = registered.runs[1]
    with changed(registered.sources(Q4), None):
        registered.client.log_text(run_id, json.dumps({"types": types}), "metrics/quantize_gguf.json")
        assert pull.main([UPLOADED]) == 0
        types["Q8_0"]["sha256"] = "0" * 64
        registered.client.log_text(run_id, json.dumps({"types": types}), "metrics/quantize_gguf.json")
        # As good as none: then all files are needed to compare with the tag.
        capsys.readouterr()
        assert refusal(capsys, UPLOADED, "--to", "elsewhere")
    registered.artifact(UPLOADED, "metrics/quantize_gguf.json").unlink()


def test_a_folder_that_no_pull_made_is_not_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("mine")
    message = refusal(capsys, UPLOADED, "--to", "mine")
    assert "the folder holds thesis.txt, and a pull replaces the whole of it" in message
    Path("link").symlink_to("mine")
    assert "not a folder" in refusal(capsys, UPLOADED, "--to", "link")
    assert pull.main([UPLOADED, "--to", "ours"]) == 0
    Path("ours/notes.txt").write_text("mine")
    capsys.readouterr()
    assert "the folder holds notes.txt" in refusal(capsys, UPLOADED, "--to", "ours")
    assert [path.read_text() for path in (Path("mine/thesis.txt"), Path("ours/notes.txt"))] == ["mine", "mine"]


def test_a_kill_between_the_two_renames_is_mended(capsys: pytest.CaptureFixture[str]) -> None:
    assert pull.main([UPLOADED]) == 0
    PULLED.rename(PULLED.with_name(".finetune-smoke.replaced"))
    partial = PULLED.with_name(".finetune-smoke.partial")
    partial.mkdir()
    (partial / "model-Q8_0.gguf").write_bytes(b"torn")
    assert pull.main([UPLOADED]) == 0
    assert "left as it is" in capsys.readouterr().err
    assert [entry.name for entry in PULLED.parent.iterdir()] == ["finetune-smoke"]


def test_names_that_are_none_say_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    known = "finetune-smoke@challenger, finetune-smoke@champion, finetune-smoke/1, finetune-smoke/2"
    for name in ("finetune-smoke@nobody", "finetune-smoke/7"):
        assert f"remedy: name one of these: {known}" in refusal(capsys, name)
    assert "remedy: name one of its models: finetune-smoke" in refusal(capsys, "another@champion")
    for name in ("finetune-smoke", "finetune-smoke@", "../x/1", "a' or ''='/1", "Smoke/1", "x/1\n"):
        assert "a version is name@alias or name/number" in refusal(capsys, name)


def test_no_remote_and_a_remote_without_the_files_name_the_remedy(
    clone: Path, registered: Registered, capsys: pytest.CaptureFixture[str]
) -> None:
    with changed([object_path(registered.remote, md5(Q8))], None):
        message = refusal(capsys, REFERENCE)
    assert "the default remote does not have the files of finetune-smoke version 1" in message
    assert "remedy: `make push` on the machine that made it" in message
    assert "remote other failed: " in refusal(capsys, REFERENCE, "--remote", "other")
    (clone / ".dvc/config").write_text("[core]\n    no_scm = true\n")
    message = refusal(capsys, REFERENCE)
    assert "and no DVC remote is set here" in message
    assert "remedy: dvc remote add --local --default team" in message


def test_what_lies_in_this_clones_cache_needs_no_remote(clone: Path, registered: Registered) -> None:
    (clone / ".dvc/config").write_text("[core]\n    no_scm = true\n")
    (clone / ".dvc/cache").mkdir()
    (clone / ".dvc/cache/files").symlink_to(registered.remote / "files")
    assert pull.main([REFERENCE]) == 0


def test_a_registry_that_is_not_there_is_refused_and_none_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fresh").mkdir()
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "fresh"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    message = refusal(capsys, REFERENCE)
    assert "there is no registry" in message
    assert "export MLFLOW_TRACKING_URI=http" in message
    assert list((tmp_path / "fresh").iterdir()) == []
