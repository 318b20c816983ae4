"""Hub, ports, MLflow -> whether they answer. Waits 3 s at most for each, and shows no token and no password."""

from __future__ import annotations

import http.client
import os
import socket
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from finetune.data_sections import HubBase
from finetune.doctor.processes import PROC, Process, describe
from finetune.doctor.result import Result, fault, ok, warning
from finetune.errors import FinetuneError
from finetune.params import Params
from finetune.source_sections import LocalOrigin

WAIT_S = 3.0
SQLITE = "sqlite:///"
LISTENING = "0A"
# What the Hub answers for a file that a readable repository does not have.
NO_SUCH_FILE = "EntryNotFound"


@dataclass(frozen=True)
class HubRepo:
    """A repository that a run reads. `fetched`: its files are there, so that no network is needed for them."""

    repo_id: str
    path: str
    fetched: bool


def hub_repositories(root: Path, params: Params, base_fetched: bool) -> list[HubRepo]:
    """The Hub repositories that params.yaml names; `path` is what a request asks for, to see whether it may be read."""
    repos = []
    if isinstance(base := params.fetch.base_model, HubBase):
        repos.append(HubRepo(base.repo_id, f"{base.repo_id}/resolve/{base.revision}/config.json", base_fetched))
    # DVC takes data/raw away before fetch runs again, and puts it in its place whole.
    raw = (root / "data/raw/manifest.json").is_file()
    for source in params.fetch.sources:
        if not isinstance(source.origin, LocalOrigin):
            name = source.origin.repo_id
            repos.append(HubRepo(name, f"datasets/{name}/resolve/{source.origin.revision}/README.md", raw))
    return repos


def hub_results(
    repos: list[HubRepo], statuses: dict[str, int | None], *, endpoint: str, token: bool, offline: bool
) -> list[Result]:
    """One result for the Hub and one for each refusal. `statuses`: HTTP status by path, None where nothing answered."""
    if not repos:
        return [ok("Hub", "not needed: all sources and the base are local")]
    known = "token present" if token else "no token"
    missing = [repo.repo_id for repo in repos if not repo.fetched]
    silent = [repo.repo_id for repo in repos if statuses.get(repo.path) is None]
    if offline or silent:
        reason = "HF_HUB_OFFLINE is set" if offline else f"{endpoint} does not answer within {WAIT_S:.0f} s"
        if not missing:
            return [
                warning("Hub", f"{reason}; all is fetched ({known})", "none is needed while nothing is fetched anew")
            ]
        remedy = "unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE" if offline else "check the network, or HF_ENDPOINT"
        return [fault("Hub", f"{reason}, and these are to be fetched: {', '.join(missing)}", remedy)]
    results = [_access(repo, statuses[repo.path], endpoint, token) for repo in repos]
    refused = [result for result in results if result is not None]
    return refused or [ok("Hub", f"{endpoint} answers for {len(repos)} repositories ({known})")]


def port_result(port: int, use: str, holder: Process | None, *, free: bool, remedy: str) -> Result:
    """Whether a port that `use` would listen on is free."""
    check = f"port {port}"
    if free:
        return ok(check, f"free, for {use}")
    return warning(
        check, f"taken by {holder.shown() if holder else 'another user or container'}, {use} needs it", remedy
    )


def mlflow_result(uri: str, refusal: str | None) -> Result:
    """Whether MLflow answers; `uri` without passwords."""
    if refusal is None:
        return ok("MLflow", f"answers: {uri}")
    remedy = "start the server (`make mlflow`), or: unset MLFLOW_TRACKING_URI"
    return fault("MLflow", f"{uri}: {refusal}; training would go on, `register` would not", remedy)


def status_of(endpoint: str, path: str, token: str | None) -> int | None:
    """The status of a HEAD request, redirects not followed; None where nothing answers within the limit."""
    address = urlsplit(endpoint)
    kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    connection = kind(address.hostname or "", address.port, timeout=WAIT_S)
    try:
        connection.request("HEAD", f"{address.path.rstrip('/')}/{path}", headers=headers)
        answer = connection.getresponse()
        readable = answer.status == 404 and answer.getheader("X-Error-Code") == NO_SUCH_FILE
        return 200 if readable else answer.status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def is_free(port: int) -> bool:
    """Whether a server could listen on this port of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def listener(port: int) -> Process | None:
    """The process that listens on a port, where it can be seen."""
    inodes = {
        fields[9]
        for name in ("tcp", "tcp6")
        for fields in map(str.split, _lines(PROC / "net" / name))
        if len(fields) > 9 and fields[3] == LISTENING and fields[1].endswith(f":{port:04X}")
    }
    sockets = {f"socket:[{inode}]" for inode in inodes}
    for folder in PROC.glob("[0-9]*/fd"):
        try:
            if any(str(link.readlink()) in sockets for link in folder.iterdir()):
                return describe(int(folder.parent.name))
        except OSError:
            continue
    return None


def mlflow_refusal(uri: str) -> str | None:
    """Why MLflow cannot be used here, or None; a file is opened without mlflow, whose import takes seconds."""
    if uri.startswith(SQLITE):
        return _database_refusal(Path(uri.removeprefix(SQLITE)))
    from finetune.tracking.client import QUICK, connect

    try:
        connect(QUICK)
    except FinetuneError as error:
        return error.what
    return None


def _access(repo: HubRepo, status: int | None, endpoint: str, token: bool) -> Result | None:
    page = f"{endpoint}/{repo.path.partition('/resolve/')[0]}"
    if status is None or status < 400:
        return None
    if status in (401, 403):
        found = f"{repo.repo_id} is gated or private ({'this token may not read it' if token else 'no token'})"
        remedy = f"accept its terms at {page}, then set HF_TOKEN to a token of that account"
        return (warning if repo.fetched else fault)("Hub", found, remedy)
    found = f"{repo.repo_id}: HTTP {status}"
    return (warning if repo.fetched else fault)("Hub", found, f"check the name and the revision at {page}")


def _database_refusal(file: Path) -> str | None:
    if not file.exists():
        return None if os.access(file.parent, os.W_OK) else f"{file.parent} cannot be written"
    try:
        with sqlite3.connect(f"file:{file}?mode=rw", uri=True, timeout=WAIT_S) as connection:
            connection.execute("select count(*) from sqlite_master").fetchone()
    except sqlite3.Error as error:
        return f"the database cannot be opened: {error}"
    return None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
