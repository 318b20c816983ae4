"""The real Hub client, in a process of its own, against a server on 127.0.0.1 that answers as the Hub does."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
from test_bpe import PARAMS, TEXTS

from finetune.data.bpe import train
from finetune.io import read_json

ROOT = Path(__file__).parents[3]
REVISION = "0123456789abcdef0123456789abcdef01234567"
DATA = {"data/a.jsonl": b'{"messages": []}\n', "data/b.csv": b"x\n", "README.md": b"# data\n"}


def model_files() -> dict[str, bytes]:
    config = {"eos_token": "</s>", "bos_token": "<s>", "pad_token": "</s>", "chat_template": "old"}
    return {
        "config.json": b"{}",
        "model.safetensors": b"weights" * 100,
        "consolidated.safetensors": b"twice",
        "original/model.safetensors": b"thrice",
        "pytorch_model.bin": b"pickle",
        "tokenizer.json": train(TEXTS, PARAMS).to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


class Hub(BaseHTTPRequestHandler):
    repos: dict[str, dict[str, bytes]] = {}  # noqa: RUF012
    failures_left = 0
    requests: list[str] = []  # noqa: RUF012
    damaged = False

    def log_message(self, *_):
        return

    def answer(self, status, content=b"", headers=None, *, body=True):
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def do_HEAD(self):
        self.serve(body=False)

    def do_GET(self):
        self.serve(body=True)

    def serve(self, *, body):
        path = unquote(self.path.split("?")[0]).lstrip("/")
        Hub.requests.append(path)
        if Hub.failures_left > 0:
            Hub.failures_left -= 1
            return self.answer(503, b"busy", body=body)
        if "gated" in path:
            return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"}, body=body)
        if "absent" in path:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body=body)
        if "f" * 40 in path:
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body=body)
        if path.startswith("api/"):
            repo = path.removeprefix("api/").split("/revision/")[0]
            content = json.dumps(self.info(repo)).encode()
            return self.answer(200, content, {"Content-Type": "application/json"}, body=body)
        repo, _, name = path.partition("/resolve/")
        content = Hub.repos[repo][name.removeprefix(REVISION + "/")]
        if Hub.damaged:
            content = content[::-1]
        return self.answer(200, content, {"ETag": f'"{blob_id(content)}"', "X-Repo-Commit": REVISION}, body=body)

    def info(self, repo):
        siblings = []
        for name, content in Hub.repos[repo.removeprefix("models/")].items():
            entry = {"rfilename": name, "size": len(content), "blobId": blob_id(content)}
            if name.endswith(".safetensors"):
                entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 1}
            siblings.append(entry)
        return {"id": repo.split("/", 1)[1], "sha": REVISION, "siblings": siblings}


@pytest.fixture
def hub():
    Hub.repos = {"datasets/team/data": DATA, "team/model": model_files()}
    Hub.failures_left, Hub.damaged = 0, False
    Hub.requests.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


PROGRAM = """
import json, sys
from pathlib import Path
from finetune.data_sections import Fetch, KeepTokenizer, Split
from finetune.errors import FinetuneError
from finetune.runtime import pin_cpu_code_path
from finetune.stages import fetch, tokenizer
pin_cpu_code_path()  # A second time, as a child process of a stage would.
source, base, work = json.loads(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])
section = Fetch.model_validate({"local_dir": ".", "base_model": base, "sources": [
    {"name": "s", "format": "messages", "license": "MIT", "language": None, "origin": source}]})
try:
    fetch.run(work / "raw", work / "base.json", work / "fetch.json", fetch=section)
    if base["kind"] == "hub":
        (work / "clean").mkdir()
        (work / "clean/records.jsonl").write_text("")
        tokenizer.run(work / "clean", work / "base.json", work / "tokenizer", work / "tokenizer.metrics.json",
            tokenizer=KeepTokenizer(strategy="keep", chat_template="recipes/smoke/chat_template.jinja"),
            split=Split(validation_share=0.1, test_share=0.1, mini_train_rows=1, pack_tokens=8))
except FinetuneError as error:
    sys.exit(str(error))
"""


def fetch(hub, work, *, repo_id="team/data", revision=REVISION, files="data/*.jsonl", base=None, offline=""):
    origin = {"kind": "hub", "repo_id": repo_id, "revision": revision, "files": files}
    arguments = [json.dumps(origin), json.dumps(base or {"kind": "scratch"}), str(work)]
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(work / "hf"), "PYTHONPATH": str(ROOT / "src")}
    # As a person runs it, not as a child of these tests, which have pinned the network off for themselves.
    for name in ("FINETUNE_CALLER_OFFLINE", "HF_HUB_OFFLINE", "HF_TOKEN"):
        environment.pop(name, None)
    if offline:
        environment["HF_HUB_OFFLINE"] = offline
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_dataset_is_downloaded_at_its_commit_and_listed(hub, tmp_path):
    done = fetch(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "raw/s/data/a.jsonl").read_bytes() == DATA["data/a.jsonl"]
    (entry,) = read_json(tmp_path / "raw/manifest.json")["sources"]
    assert entry == {
        "name": "s",
        "format": "messages",
        "license": "MIT",
        "origin": "hub:team/data/data/*.jsonl",
        "revision": REVISION,
        "files": [
            {
                "path": "s/data/a.jsonl",
                "sha256": hashlib.sha256(DATA["data/a.jsonl"]).hexdigest(),
                "size_bytes": 17,
            }
        ],
    }


def test_a_hub_that_is_busy_twice_is_asked_again(hub, tmp_path):
    Hub.failures_left = 2
    done = fetch(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "raw/s/data/a.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "what", "remedy"),
    [
        ({"repo_id": "team/gated"}, "access is restricted", "/datasets/team/gated, then set HF_TOKEN"),
        ({"repo_id": "team/absent"}, "no such repository, or no access", "check the name at"),
        ({"revision": "f" * 40}, "no such commit", "/commits/main"),
        ({"files": "*.parquet"}, "no file matches '*.parquet'; it has: README.md, data/a.jsonl", "mend `files`"),
    ],
)
def test_what_the_hub_refuses_is_an_error_that_says_where_to_go(hub, tmp_path, change, what, remedy):
    done = fetch(hub, tmp_path, **change)
    assert done.returncode == 1
    assert what in done.stderr
    assert remedy in done.stderr
    assert len(Hub.requests) < 4


def test_a_file_that_differs_from_the_hash_of_the_hub_is_refused(hub, tmp_path):
    Hub.damaged = True
    done = fetch(hub, tmp_path)
    assert done.returncode == 1
    assert "data/a.jsonl has hash" in done.stderr


def test_a_base_model_comes_without_pickles_and_its_tokenizer_is_kept(hub, tmp_path):
    done = fetch(hub, tmp_path, base={"kind": "hub", "repo_id": "team/model", "revision": REVISION})
    assert done.returncode == 0, done.stderr
    manifest = read_json(tmp_path / "base.json")
    assert (manifest["kind"], manifest["repo_id"], manifest["revision"]) == ("hub", "team/model", REVISION)
    names = [file["path"] for file in manifest["files"]]
    assert names == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    config = read_json(tmp_path / "tokenizer/tokenizer_config.json")
    assert (config["pad_token"], config["eos_token"], "chat_template" in config) == ("<pad>", "</s>", False)
    assert sorted(path.name for path in (tmp_path / "tokenizer").iterdir()) == [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_template.jinja",
    ]


def test_offline_by_the_callers_wish_takes_the_cache_and_asks_nobody(hub, tmp_path):
    base = {"kind": "hub", "repo_id": "team/model", "revision": REVISION}
    assert fetch(hub, tmp_path, base=base).returncode == 0
    first = {name: (tmp_path / name).read_bytes() for name in ("raw/manifest.json", "base.json")}
    Hub.requests.clear()
    shutil.rmtree(tmp_path / "clean")
    done = fetch(hub, tmp_path, base=base, offline="yes")
    assert done.returncode == 0, done.stderr
    assert {name: (tmp_path / name).read_bytes() for name in first} == first
    assert Hub.requests == []
    assert (
        f"dataset team/data at {REVISION}: offline, taking the 1 files in the Hub cache for all it has" in done.stderr
    )


def test_offline_by_the_callers_wish_and_nothing_in_the_cache_says_what_to_do(hub, tmp_path):
    done = fetch(hub, tmp_path, offline="1")
    assert done.returncode == 1
    assert "the Hub cache does not hold it, and HF_HUB_OFFLINE forbids to download it" in done.stderr
    assert "unset HF_HUB_OFFLINE" in done.stderr
    assert Hub.requests == []


def test_offline_a_file_of_the_cache_that_was_damaged_is_refused(hub, tmp_path):
    assert fetch(hub, tmp_path).returncode == 0
    (blob,) = (tmp_path / "hf/hub/datasets--team--data/blobs").iterdir()
    blob.write_bytes(b"other")
    done = fetch(hub, tmp_path, offline="1")
    assert done.returncode == 1
    assert "data/a.jsonl has hash" in done.stderr


def test_a_base_model_of_pickles_only_is_refused(hub, tmp_path):
    del Hub.repos["team/model"]["model.safetensors"]
    done = fetch(hub, tmp_path, base={"kind": "hub", "repo_id": "team/model", "revision": REVISION})
    assert done.returncode == 1
    assert "it has no safetensors weights" in done.stderr
