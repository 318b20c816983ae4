"""The real Hub client, in its own process, against a server on 127.0.0.1 that answers and fails as the Hub does."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hub_server import REVISION, SIGNATURE, TOKEN, Fault, fetch, fetch_each, run_program, serving, source

from finetune.io import read_json

MESSAGES, CSV = b'{"messages": []}\n', b"x\n"
DATA = {"data/a.jsonl": MESSAGES, "data/b.csv": CSV, "README.md": b"# data\n", "other/c.jsonl": b"{}\n"}
MODEL = {
    "config.json": b"{}",
    "model.safetensors": b"weights" * 100,
    "consolidated.safetensors": b"twice",
    "original/model.safetensors": b"thrice",
    "pytorch_model.bin": b"pickle",
    "tokenizer.json": b'{"version": "1.0"}',
}
BASE = {"kind": "hub", "repo_id": "team/model", "revision": REVISION}
MIB = 1 << 20
BIG = bytes(range(256)) * (24 * MIB // 256)


@pytest.fixture
def hub():
    yield from serving({"datasets/team/data": dict(DATA), "team/model": dict(MODEL)})


def everything_below(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_a_dataset_is_downloaded_at_its_commit_listed_and_kept_once(hub, tmp_path):
    done = fetch(hub, tmp_path, source())
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "raw/s/data/a.jsonl").read_bytes() == MESSAGES
    (entry,) = read_json(tmp_path / "raw/manifest.json")["sources"]
    assert entry == {
        "name": "s",
        "use": "training",
        "format": "messages",
        "license": "MIT",
        "origin": "hub:team/data/data/*.jsonl",
        "revision": REVISION,
        "files": [
            {"path": "s/data/a.jsonl", "sha256": hashlib.sha256(MESSAGES).hexdigest(), "size_bytes": len(MESSAGES)}
        ],
        "streamed": None,
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.json", "fetch.json", "raw"]


def test_a_long_listing_is_read_to_its_last_page(hub, tmp_path):
    hub.repos["datasets/team/data"] |= {f"data/{number:02}.jsonl": b"%d\n" % number for number in range(11)}
    assert fetch(hub, tmp_path, source()).returncode == 0
    assert read_json(tmp_path / "fetch.json")["files"] == 12


def test_a_hub_that_is_busy_twice_is_asked_again(hub, tmp_path):
    hub.faults = [Fault(f"revision/{REVISION}", "busy"), Fault("a.jsonl", "busy")]
    done = fetch(hub, tmp_path, source())
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "raw/s/data/a.jsonl").read_bytes() == MESSAGES


def test_what_the_hub_refuses_is_an_error_that_says_where_to_go(hub, tmp_path):
    cases = [
        ({"repo_id": "team/absent"}, "no such repository, or no access to it (HTTP 404)", "check the name at "),
        ({"revision": "f" * 40}, "the repository has no such commit, branch or tag", "team/data/commits/main"),
        ({"files": "*.parquet"}, "no file matches '*.parquet'; it has: README.md, data/a.jsonl, ", "mend `files`"),
        ({"files": "nowhere/*.txt"}, "no file matches 'nowhere/*.txt'; it has: none there", "mend `files`"),
    ]
    errors = fetch_each(hub, tmp_path, *(source(**change) for change, _, _ in cases))
    starts = [errors.find(text) for _, what, remedy in cases for text in (what, remedy)]
    assert starts[0] == 0
    assert len(starts) == 8
    assert all(start >= 0 for start in starts)
    # Nothing is asked twice: the commit, and a listing where it exists.
    assert len(hub.requests) == 1 + 1 + 2 + 2


def test_gated_sets_and_other_faults_are_named_together_before_any_download(hub, tmp_path):
    hub.repos |= {"datasets/team/gated": {"data/g.jsonl": MESSAGES}, "datasets/team/secret": {"data/h.jsonl": MESSAGES}}
    hub.gated = {"datasets/team/gated", "datasets/team/secret"}
    local = {"kind": "local", "files": "*.csv"}
    sources = [source(), source("g", repo_id="team/gated"), source("h", repo_id="team/secret")]
    done = fetch(hub, tmp_path, *sources, {**source("l"), "origin": local}, local_dir=tmp_path, base=BASE)
    assert done.returncode == 1
    assert "3 faults:" in done.stderr
    for name in ("gated", "secret"):
        assert f"where:  dataset team/{name} at {REVISION}" in done.stderr
        assert f"accept its terms at {hub.url}/datasets/team/{name}, then set HF_TOKEN" in done.stderr
    assert "no file matches '*.csv'" in done.stderr
    assert not [request for request in hub.requests if request.sent_bytes or request.path.startswith("cdn/")]
    assert not (tmp_path / "raw").exists()


def test_the_token_goes_to_the_hub_only_and_into_no_log_error_or_file(hub, tmp_path):
    hub.gated = {"datasets/team/data"}
    hub.repos["datasets/team/data"]["data/big.jsonl"] = BIG
    hub.faults = [Fault("big.jsonl", "cut", 15 * MIB), Fault("a.jsonl", "busy")]
    done = fetch(hub, tmp_path, source(), HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert "Trying to resume" in done.stderr
    stored = [request for request in hub.requests if request.path.startswith("cdn/")]
    assert {request.authorization for request in stored} == {None}
    assert {request.authorization for request in hub.requests if request not in stored} == {f"Bearer {TOKEN}"}
    hub.faults = [Fault("a.jsonl", "corrupt")]
    refused = fetch(hub, tmp_path, source(files="data/a.jsonl"), HF_TOKEN=TOKEN)
    assert refused.returncode == 1
    written = (done.stderr + refused.stderr).encode() + everything_below(tmp_path)
    for secret in (TOKEN, SIGNATURE):
        assert secret.encode() not in written


@pytest.mark.parametrize("kind", ["cut", "stall", "reset"])
def test_a_download_that_breaks_ends_with_the_right_bytes(hub, tmp_path, kind):
    hub.repos["datasets/team/data"]["data/a.jsonl"] = BIG
    hub.faults = [Fault("a.jsonl", kind, 15 * MIB)]
    done = fetch(hub, tmp_path, source())
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "raw/s/data/a.jsonl").read_bytes() == BIG
    ranges = [request.range for request in hub.of("a.jsonl") if request.path.startswith("cdn/")]
    # The client writes 10 MiB at a time. After a reset it starts the file again.
    assert ranges == [None, None if kind == "reset" else f"bytes={10 * MIB}-"]


def test_a_server_that_stays_silent_or_stalls_for_ever_ends_in_bounded_time(hub, tmp_path):
    hub.repos["datasets/team/silent"] = {"data/s.jsonl": MESSAGES}
    hub.faults = [Fault(f"silent/revision/{REVISION}", "silent", times=99), Fault("a.jsonl", "stall", 5, times=99)]
    with ThreadPoolExecutor(2) as pool:
        twice = (source(repo_id="team/silent"), source("t", repo_id="team/silent"))
        silent = pool.submit(fetch, hub, tmp_path / "silent", *twice)
        stalled = pool.submit(fetch, hub, tmp_path / "stalled", source())
    for done in (silent.result(), stalled.result()):
        assert done.returncode == 1
        assert "the Hub does not answer, try after try: timed out" in done.stderr
        assert "HF_HUB_DOWNLOAD_TIMEOUT" in done.stderr
    # The second source is not asked for: nobody answers there.
    assert len([request for request in hub.requests if "silent" in request.path]) == 4
    assert len([request for request in hub.of("a.jsonl") if request.path.startswith("cdn/")]) == 6


def test_a_wrong_byte_is_refused_and_a_second_try_downloads_only_that_file(hub, tmp_path):
    hub.faults = [Fault("b.csv", "corrupt")]
    sources = [source(files="data/*"), source("t", files="README.md")]
    done = fetch(hub, tmp_path, *sources)
    assert done.returncode == 1
    assert "data/b.csv has hash" in done.stderr
    hub.requests.clear()
    done = fetch(hub, tmp_path, *sources)
    assert done.returncode == 0, done.stderr
    assert [request.path.rpartition("/")[2] for request in hub.requests if request.sent_bytes] == ["b.csv", "README.md"]
    hub.faults = [Fault("a.jsonl", "corrupt")]
    assert "data/a.jsonl has hash" in fetch(hub, tmp_path, source()).stderr


def test_a_disk_without_room_is_refused_with_the_numbers_before_any_download(hub, tmp_path):
    hub.sizes = {"data/a.jsonl": 10**16, "model.safetensors": 10**16}
    done = fetch(hub, tmp_path, source(), base=BASE)
    assert done.returncode == 1
    assert "20000000.000 GB are to be read, and the disk has" in done.stderr
    assert not [request for request in hub.requests if request.sent_bytes]


def test_a_base_model_comes_without_pickles_and_into_the_hub_cache(hub, tmp_path):
    done = fetch(hub, tmp_path, source(), base=BASE)
    assert done.returncode == 0, done.stderr
    manifest = read_json(tmp_path / "base.json")
    assert (manifest["kind"], manifest["repo_id"], manifest["revision"]) == ("hub", "team/model", REVISION)
    assert [file["path"] for file in manifest["files"]] == ["config.json", "model.safetensors", "tokenizer.json"]
    assert manifest["files"][1]["sha256"] == hashlib.sha256(b"weights" * 100).hexdigest()
    blobs = sorted(path.stat().st_size for path in (tmp_path / "hf/hub/models--team--model/blobs").iterdir())
    assert blobs == [2, 18, 700]
    hub.requests.clear()
    assert fetch(hub, tmp_path, source(), base=BASE).returncode == 0
    assert not [request for request in hub.of("safetensors") if request.sent_bytes]


def test_a_base_model_of_pickles_only_is_refused(hub, tmp_path):
    del hub.repos["team/model"]["model.safetensors"]
    done = fetch(hub, tmp_path, source(), base=BASE)
    assert done.returncode == 1
    assert "it has no safetensors weights" in done.stderr


CARRY = "import sys, json; from huggingface_hub import snapshot_download; snapshot_download(**json.loads(sys.argv[1]))"


def test_offline_by_the_callers_wish_takes_a_copy_of_the_cache_and_asks_nobody(hub, tmp_path):
    for repo_type, repo_id in (("dataset", "team/data"), ("model", "team/model")):
        wanted = {"repo_id": repo_id, "repo_type": repo_type, "revision": REVISION, "max_workers": 1}
        assert run_program(CARRY, [json.dumps(wanted)], hub, tmp_path).returncode == 0
    hub.requests.clear()
    done = fetch(hub, tmp_path, source(), base=BASE, HF_HUB_OFFLINE="yes")
    assert done.returncode == 0, done.stderr
    assert hub.requests == []
    assert (tmp_path / "raw/s/data/a.jsonl").read_bytes() == MESSAGES
    assert [file["size_bytes"] for file in read_json(tmp_path / "base.json")["files"]] == [2, 700, 18]
    assert f"dataset team/data at {REVISION}: offline, taking the 4 files" in done.stderr
    (blob,) = (path for path in (tmp_path / "hf/hub/datasets--team--data/blobs").iterdir() if path.stat().st_size == 17)
    blob.write_bytes(b"other")
    done = fetch(hub, tmp_path, source(), HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert "data/a.jsonl has hash" in done.stderr


def test_offline_by_the_callers_wish_and_nothing_in_the_cache_says_what_to_do(hub, tmp_path):
    stream = {"kind": "hub_stream", "repo_id": "team/data", "revision": REVISION, "files": "*.jsonl"}
    sources = [source(), {**source("t"), "origin": {**stream, "max_rows": 1, "max_bytes": None}}]
    done = fetch(hub, tmp_path, *sources, HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert "the Hub cache does not hold it, and HF_HUB_OFFLINE forbids to download it" in done.stderr
    assert "offline mode forbids to ask the Hub" in done.stderr
    assert "unset HF_HUB_OFFLINE" in done.stderr
    assert hub.requests == []
