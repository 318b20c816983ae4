"""A server on 127.0.0.1 that answers as the Hub does, and on command stalls, cuts, resets, corrupts or is busy.

Large files (by suffix) are sent from a second address, as the Hub's storage does: a redirect to a signed link, which
must not get the token. Nothing waits longer than STALL_S.
"""

import hashlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

ROOT = Path(__file__).parents[3]
REVISION = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_secretsecretsecret"
SIGNATURE = "signedforyou"
LARGE = (".safetensors", ".gz", ".parquet", ".bin", ".jsonl")
PAGE_ENTRIES, STALL_S, PIECE_BYTES = 4, 60, 1 << 16


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@dataclass
class Fault:
    """What happens to the next request for a path that ends so: `kind` after `sent_bytes` of the body."""

    path: str
    kind: str  # busy, silent (no answer), stall, cut, reset, corrupt, whole (the range is ignored)
    sent_bytes: int = 0
    times: int = 1


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    authorization: str | None
    sent_bytes: int = 0


@dataclass
class State:
    """What the Hub holds: files by repository (`datasets/team/data`, `team/model`), commits by branch or tag."""

    repos: dict[str, dict[str, bytes]]
    commits: dict[str, str] = field(default_factory=lambda: {"main": REVISION})
    gated: set[str] = field(default_factory=set)
    sizes: dict[str, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    url: str = ""
    released: threading.Event = field(default_factory=threading.Event)

    def of(self, suffix: str, method: str = "GET") -> list[Request]:
        """The requests for a file's content, at either address."""
        return [entry for entry in self.requests if entry.method == method and entry.path.endswith(suffix)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    @property
    def state(self) -> State:
        return self.server.state

    def log_message(self, *_):
        return

    def do_HEAD(self):
        self.serve()

    def do_GET(self):
        self.serve()

    def serve(self):
        url = urlsplit(self.path)
        path = unquote(url.path).lstrip("/")
        request = Request(self.command, path, self.headers.get("Range"), self.headers.get("Authorization"))
        self.state.requests.append(request)
        if fault := self.take(path, "busy", "silent"):
            self.close_connection = True
            return self.answer(503, b"busy") if fault.kind == "busy" else self.state.released.wait(STALL_S)
        if path.startswith("api/"):
            return self.api(path.removeprefix("api/"), parse_qs(url.query))
        if path.startswith("cdn/"):
            if f"Signature={SIGNATURE}" not in url.query:
                return self.answer(403, b"not signed")
            repo, _, rest = path.removeprefix("cdn/").partition("/resolve/")
            return self.content(repo, rest.partition("/")[2], request)
        return self.resolve(path, request)

    def take(self, path, *kinds):
        """The next fault of one of these kinds for the path, used up once; or None."""
        for fault in self.state.faults:
            if fault.times and fault.kind in kinds and path.endswith(fault.path):
                fault.times -= 1
                return fault
        return None

    def answer(self, status, content=b"", headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def missing(self, code, status=404):
        return self.answer(status, b"{}", {"X-Error-Code": code})

    def api(self, path, query):
        kind, _, rest = path.partition("/")
        repo, _, what = rest.partition("/revision/") if "/revision/" in rest else rest.partition("/tree/")
        key = f"datasets/{repo}" if kind == "datasets" else repo
        if key not in self.state.repos:
            return self.missing("RepoNotFound")
        revision, _, folder = what.partition("/")
        commit = self.state.commits.get(revision, revision)
        if commit not in self.state.commits.values():
            return self.missing("RevisionNotFound")
        if "/revision/" in rest:
            return self.json({"id": repo, "sha": commit})
        entries = [self.entry(key, name) for name in sorted(self.state.repos[key]) if name.startswith(folder)]
        if not entries:
            return self.missing("EntryNotFound")
        start = int(query.get("cursor", ["0"])[0])
        link = f'<{self.state.url}/api/{quote(path)}?recursive=True&cursor={start + PAGE_ENTRIES}>; rel="next"'
        more = start + PAGE_ENTRIES < len(entries)
        return self.json(entries[start : start + PAGE_ENTRIES], {"Link": link} if more else {})

    def entry(self, repo, name):
        content = self.state.repos[repo][name]
        size = self.state.sizes.get(name, len(content))
        entry = {"type": "file", "path": name, "size": size, "oid": blob_id(content)}
        if name.endswith(LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 1}
        return entry

    def json(self, value, headers=None):
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def resolve(self, path, request):
        repo, _, rest = path.partition("/resolve/")
        name = rest.partition("/")[2]
        if repo in self.state.gated and request.authorization != f"Bearer {TOKEN}":
            return self.missing("GatedRepo", 403 if request.authorization else 401)
        if name not in self.state.repos[repo]:
            return self.missing("EntryNotFound")
        if not name.endswith(LARGE):
            return self.content(repo, name, request)
        content = self.state.repos[repo][name]
        headers = {
            "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Linked-Size": len(content),
            "X-Repo-Commit": REVISION,
            "Location": f"http://localhost:{self.server.server_port}/cdn/{quote(path)}?X-Signature={SIGNATURE}",
        }
        return self.answer(302, b"", headers)

    def content(self, repo, name, request):
        content = self.state.repos[repo][name]
        fault = self.take(name, "stall", "cut", "reset", "corrupt", "whole") if self.command == "GET" else None
        kind = fault.kind if fault else ""
        headers = {"ETag": f'"{blob_id(content)}"', "X-Repo-Commit": REVISION}
        first, last = 0, len(content) - 1
        if request.range and kind != "whole":
            start, _, end = request.range.removeprefix("bytes=").partition("-")
            first, last = int(start), min(int(end or last), last)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        body = content[first : last + 1]
        if kind == "corrupt":
            body = bytes([body[0] ^ 1]) + body[1:]
        self.send_response(206 if "Content-Range" in headers else 200)
        for header, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(header, str(value))
        self.end_headers()
        if self.command == "GET":
            self.send_body(body, request, fault)

    def send_body(self, body, request, fault):
        limit = fault.sent_bytes if fault and fault.kind in ("stall", "cut", "reset") else len(body)
        try:
            for start in range(0, min(limit, len(body)), PIECE_BYTES):
                piece = body[start : min(start + PIECE_BYTES, limit)]
                self.wfile.write(piece)
                request.sent_bytes += len(piece)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
            return
        if limit < len(body):
            self.close_connection = True
            if fault.kind == "stall":
                self.state.released.wait(STALL_S)
            if fault.kind == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()


class Server(ThreadingHTTPServer):
    daemon_threads = True
    state: State

    def handle_error(self, *_):
        return


def serving(repos):
    """Yield the State of a running server."""
    server = Server(("127.0.0.1", 0), Handler)
    server.state = State(repos, url=f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server.state
    server.state.released.set()
    server.shutdown()
    server.server_close()


def run_program(code: str, arguments: list[str], hub: State, work: Path, **environment: str):
    """Run Python code as a person would: not as a child of these tests, which have pinned the network off."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "FINETUNE_"))}
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(work / "hf"),
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        "HF_HUB_ETAG_TIMEOUT": "1",
        "PYTHONPATH": str(ROOT / "src"),
        **environment,
    }
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env={**inherited, **settings}, cwd=ROOT, capture_output=True, text=True, timeout=120)


FETCH = """
import json, sys, time
sleep, time.sleep = time.sleep, lambda seconds: sleep(min(seconds, 0.01))  # Between tries; what is waited for is real.
from pathlib import Path
from finetune.stages import fetch
from finetune.data_sections import Fetch
from finetune.errors import FinetuneError
from finetune.log import setup_logging
from finetune.runtime import pin_cpu_code_path
pin_cpu_code_path()  # A second time, as a child process of a stage would.
setup_logging("fetch")
for argument in sys.argv[2:]:
    section, work = Fetch.model_validate(json.loads(argument)), Path(sys.argv[1])
    try:
        fetch.run(work / "raw", work / "base.json", work / "fetch.json", fetch=section)
    except FinetuneError as error:
        print(error, file=sys.stderr)
        if argument == sys.argv[-1]:
            sys.exit(1)
"""


def source(name="s", **origin):
    """A training source of messages, from the Hub unless `kind` says otherwise."""
    place = {"kind": "hub", "repo_id": "team/data", "revision": REVISION, "files": "data/*.jsonl", **origin}
    return {
        "name": name, "format": "messages", "use": "training", "origin": place, "license": "MIT", "language": None,
        "columns": {}, "filters": [], "group_characters": None, "prompt": None, "paths": None,
    }  # fmt: skip


def streamed_source(name="s", *, files, max_rows=None, max_bytes=None):
    return source(name, kind="hub_stream", files=files, max_rows=max_rows, max_bytes=max_bytes)


def fetch(hub, work, *sources, base=None, local_dir=".", **environment):
    """Run the fetch stage into `work/raw`, `work/base.json` and `work/fetch.json`."""
    section = {"local_dir": str(local_dir), "base_model": base or {"kind": "scratch"}, "sources": list(sources)}
    return run_program(FETCH, [str(work), json.dumps(section)], hub, work, **environment)


def fetch_each(hub, work, *sources):
    """Run the stage once a source, in one process: the faults by source, in order, as one text."""
    sections = [{"local_dir": ".", "base_model": {"kind": "scratch"}, "sources": [source]} for source in sources]
    return run_program(FETCH, [str(work), *map(json.dumps, sections)], hub, work).stderr
