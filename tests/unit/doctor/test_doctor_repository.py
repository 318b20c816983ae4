"""params.yaml, inputs, locks, tools, Hub, ports and MLflow: what each check says of which facts; the whole table."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from finetune.data_sections import HubBase
from finetune.doctor.__main__ import main
from finetune.doctor.base_files import missing_bytes
from finetune.doctor.locks import ReadWriteLock, sole_run
from finetune.doctor.processes import Process
from finetune.doctor.repository import (
    check_repository,
    dvc_lock_result,
    inputs_result,
    locks_result,
    read_params,
    tools_result,
)
from finetune.doctor.result import ok
from finetune.doctor.services import (
    HubRepo,
    hub_repositories,
    hub_results,
    is_free,
    listener,
    mlflow_refusal,
    mlflow_result,
    port_result,
    status_of,
)
from finetune.params import Params, load_params

ROOT = Path(__file__).resolve().parents[3]
COMMIT = "0" * 40
NOBODY = ReadWriteLock((), torn=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What doctor reads of a fresh clone."""
    for name in ("data/sample", "recipes/smoke", "requirements"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copyfile(ROOT / "recipes/smoke/params.yaml", tmp_path / "params.yaml")
    (tmp_path / ".dvc").mkdir()
    shutil.copyfile(ROOT / ".dvc/config", tmp_path / ".dvc/config")
    return tmp_path


@pytest.fixture(scope="module")
def smoke() -> Params:
    return load_params(ROOT / "recipes/smoke/params.yaml")


def test_params_that_are_not_valid_are_listed(copy: Path) -> None:
    assert read_params(copy)[0] == ok("params.yaml", "valid, recipe smoke")
    text = (copy / "params.yaml").read_text()
    (copy / "params.yaml").write_text(text.replace("epochs: 5", "epochs: 0").replace("rank: 32", "rank: many"))
    result, params = read_params(copy)
    assert (result.verdict, params) == ("fault", None)
    assert "train_qlora.epochs" in result.found
    assert "train_qlora.lora.rank" in result.found


def test_a_missing_input_is_named_with_its_key(copy: Path, smoke: Params) -> None:
    assert inputs_result(copy, smoke) == ok("input files", "9 files are there")
    (copy / "data/sample/tweets.csv").unlink()
    (copy / "data/sample/tool_calls/workshop_simple_answers.jsonl").unlink()
    result = inputs_result(copy, smoke)
    assert result.verdict == "fault"
    assert result.found.splitlines() == [
        f"fetch.sources, tweets: no file matches 'tweets.csv' below {copy}/data/sample",
        "evaluate.tool_calls.workshop_simple: data/sample/tool_calls/workshop_simple_answers.jsonl is missing",
    ]
    assert len((result.remedy or "").splitlines()) == 2


def test_dvc_lock_is_whole_torn_or_merged() -> None:
    assert dvc_lock_result(None) == ok("dvc.lock", "none yet: every stage runs")
    assert dvc_lock_result(b"schema: '2.0'\nstages: {}\n") == ok("dvc.lock", "whole")
    assert dvc_lock_result(b"schema: '2.0'\nstages:\n  a:").verdict == "warning"
    merged = dvc_lock_result(b"schema: '2.0'\n<<<<<<< HEAD\n=======\n>>>>>>> other\n")
    assert (merged.verdict, merged.found) == ("fault", "merge marks in line 2")


def test_a_run_at_work_is_a_fault_and_a_killed_one_a_warning() -> None:
    run, stage = Process(12, "dvc repro", None), Process(13, "python -m finetune.stages.train_qlora", "train_qlora")
    assert locks_result([], NOBODY, []) == ok("locks", "free")
    busy = locks_result([run], NOBODY, [])
    assert (busy.verdict, busy.found) == ("fault", "a run is at work here: PID 12 (dvc repro)")
    assert busy.remedy == "wait: tail --pid=12 -f /dev/null; or stop it: kill -INT 12"
    left = locks_result([], NOBODY, [stage])
    assert (left.verdict, left.found[:52]) == ("warning", "stage train_qlora of a killed run is still at work: ")
    assert locks_result([], ReadWriteLock((12,), torn=False), []).found == ".dvc/tmp/rwlock, of dead PID 12"
    assert locks_result([], ReadWriteLock((), torn=True), []).verdict == "warning"


def test_the_lock_of_a_living_run_is_seen_and_not_taken(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_TOOLS", str(copy / "none"))
    results, _ = check_repository(copy)
    assert {result.check: result.verdict for result in results} == {
        "params.yaml": "ok", "input files": "ok", "dvc.lock": "ok", "locks": "ok", "tools": "fault"
    }  # fmt: skip
    with sole_run(copy):
        results, _ = check_repository(copy)
    assert {result.check: result.verdict for result in results}["locks"] == "fault"


def test_missing_tools_are_a_fault() -> None:
    assert tools_result([]).verdict == "ok"
    assert tools_result(["/x/convert"]).found == "missing: /x/convert"


@pytest.fixture
def hub() -> Iterator[str]:
    """A server that answers as the Hub does for a gated, an open and an unknown repository."""

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            status = {"/gated/model": 401, "/open/model": 307, "/datasets/open/data": 404}.get(
                self.path.partition("/resolve/")[0], 404
            )
            allowed = self.headers["Authorization"] == "Bearer hf_right"
            self.send_response(200 if status == 401 and allowed else status)
            if self.path.startswith("/datasets/open"):
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_hub_is_asked_for_one_file_of_each_repository(hub: str) -> None:
    assert status_of(hub, f"open/model/resolve/{COMMIT}/config.json", None) == 307
    assert status_of(hub, f"gated/model/resolve/{COMMIT}/config.json", None) == 401
    assert status_of(hub, f"gated/model/resolve/{COMMIT}/config.json", "hf_right") == 200
    assert status_of(hub, f"datasets/open/data/resolve/{COMMIT}/README.md", None) == 200
    assert status_of(hub, f"no/model/resolve/{COMMIT}/config.json", None) == 404
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert status_of(f"http://127.0.0.1:{unused.getsockname()[1]}", "x", None) is None


def test_what_a_refusal_of_the_hub_means() -> None:
    gated = HubRepo("meta/model", f"meta/model/resolve/{COMMIT}/config.json", fetched=False)
    there = HubRepo("a/data", f"datasets/a/data/resolve/{COMMIT}/README.md", fetched=True)
    asked = {"endpoint": "https://hub", "token": False, "offline": False}
    assert hub_results([], {}, **asked)[0].verdict == "ok"  # type: ignore[arg-type]
    both = hub_results([gated, there], {gated.path: 307, there.path: 200}, **asked)  # type: ignore[arg-type]
    assert both == [ok("Hub", "https://hub answers for 2 repositories (no token)")]
    (refused,) = hub_results([gated], {gated.path: 401}, **asked)  # type: ignore[arg-type]
    assert (refused.verdict, refused.found) == ("fault", "meta/model is gated or private (no token)")
    assert refused.remedy == "accept its terms at https://hub/meta/model, then set HF_TOKEN to a token of that account"
    (unknown,) = hub_results([gated], {gated.path: 404}, **asked)  # type: ignore[arg-type]
    assert (unknown.verdict, unknown.found) == ("fault", "meta/model: HTTP 404")
    (known,) = hub_results([there], {there.path: 403}, endpoint="https://hub", token=True, offline=False)
    assert (known.verdict, known.found) == ("warning", "a/data is gated or private (this token may not read it)")
    assert "https://hub/datasets/a/data" in (known.remedy or "")


def test_a_silent_hub_is_a_fault_only_where_something_is_to_be_fetched() -> None:
    new = HubRepo("a/new", "a/new/resolve/x/config.json", fetched=False)
    there = HubRepo("a/there", "a/there/resolve/x/config.json", fetched=True)
    silent = {"endpoint": "https://hub", "token": True}
    (warned,) = hub_results([there], {there.path: None}, offline=False, **silent)  # type: ignore[arg-type]
    found = "https://hub does not answer within 3 s; all is fetched (token present)"
    assert (warned.verdict, warned.found) == ("warning", found)
    (stopped,) = hub_results([there, new], {there.path: None}, offline=False, **silent)  # type: ignore[arg-type]
    assert (stopped.verdict, stopped.found[-34:]) == ("fault", "and these are to be fetched: a/new")
    (wished,) = hub_results([new], {}, offline=True, **silent)  # type: ignore[arg-type]
    assert wished.remedy == "unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE"


def test_the_repositories_of_a_recipe_and_what_of_them_is_there(tmp_path: Path) -> None:
    gpt2 = load_params(ROOT / "recipes/gpt2_guide/params.yaml")
    base = gpt2.fetch.base_model
    assert isinstance(base, HubBase)
    first = hub_repositories(tmp_path, gpt2, base_fetched=True)[0]
    assert (first.repo_id, first.fetched) == ("openai-community/gpt2", True)
    assert first.path == f"openai-community/gpt2/resolve/{base.revision}/config.json"
    files = [{"path": "config.json", "size_bytes": 5}, {"path": "model.safetensors", "size_bytes": 500}]
    manifest = {"kind": "hub", "repo_id": base.repo_id, "revision": base.revision, "files": files}
    (tmp_path / "config.json").write_text("{}")
    assert missing_bytes(manifest, base, None) == 505
    assert missing_bytes(manifest, base, tmp_path) == 500
    assert missing_bytes({**manifest, "revision": COMMIT}, base, tmp_path) is None
    assert missing_bytes({}, base, tmp_path) is None


def test_a_taken_port_names_its_holder() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        assert not is_free(port)
        holder = listener(port)
    assert holder is not None
    assert holder.pid == os.getpid()
    assert is_free(port)
    assert listener(port) is None
    taken = port_result(8000, "make serve", Process(7, "uvicorn", None), free=False, remedy="make serve PORT=8001")
    found = "taken by PID 7 (uvicorn), make serve needs it"
    assert (taken.verdict, taken.found, taken.remedy) == ("warning", found, "make serve PORT=8001")
    assert port_result(8000, "make serve", None, free=True, remedy="").verdict == "ok"


def test_the_database_of_mlflow_can_be_opened_or_the_reason_is_said(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert mlflow_refusal(uri) is None
    sqlite3.connect(tmp_path / "mlflow.db").close()
    assert mlflow_refusal(uri) is None
    (tmp_path / "mlflow.db").write_text("no database")
    assert mlflow_refusal(uri) == "the database cannot be opened: file is not a database"
    refused = mlflow_result(uri, "no")
    assert (refused.verdict, mlflow_result(uri, None).verdict) == ("fault", "ok")


def test_doctor_of_a_fresh_clone_finds_no_fault(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (ROOT / ".tools").is_dir():
        pytest.skip("make setup has not made .tools")
    monkeypatch.chdir(copy)
    monkeypatch.setenv("FINETUNE_TOOLS", str(ROOT / ".tools"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main(["--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    verdicts = {entry["check"]: entry["verdict"] for entry in shown["checks"]}
    assert {verdicts[name] for name in ("params.yaml", "libraries", "bitsandbytes", "MLflow")} == {"ok"}
    assert verdicts["memory of training"] == "warning"
    (copy / "data/sample/tweets.csv").unlink()
    assert main([]) == 1
    shown = capsys.readouterr().out
    assert "FAULT    input files " in shown
    assert "1 faults, " in shown
