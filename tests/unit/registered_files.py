"""Two registered versions by hand, one that the registry holds whole and one that it only names, and another machine.

Version 1 (`champion`) was registered by reference: its GGUF files are in DVC's remote. Version 2 (`challenger`) is the
same model, uploaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pytest
from ruamel.yaml import YAML

from finetune.export.modelfile import Modelfile, render_modelfile
from finetune.io import sha256_tree
from finetune.lineage import lock_sha256

NAME, REFERENCE, UPLOADED = "finetune-smoke", "finetune-smoke/1", "finetune-smoke/2"
Q8, Q4 = b"GGUF of eight bits" * 500, b"GGUF of four bits" * 300
TEMPLATE = "{{ range .Messages }}{{ .Content }}{{ end }}"
MODELFILE = Modelfile("../gguf/model-Q8_0.gguf", TEMPLATE, "Be short.", 1024, 0.2, 0.9, 1.0, ("</s>",))


@dataclass(frozen=True)
class Registered:
    """The outs of the machine that made the versions, their artifacts by run, the remote, and the registry's client."""

    outs: Path
    remote: Path
    artifacts: Path
    runs: Sequence[str]
    client: Any
    uri: str

    def artifact(self, version: str, path: str) -> Path:
        """A file of a version's run, as the server keeps it."""
        return self.artifacts / self.runs[int(version.rpartition("/")[2]) - 1] / "artifacts" / path

    def sources(self, content: bytes) -> list[Path]:
        """Every place that a pull could have a GGUF of this content from."""
        stored = [file for file in self.artifacts.rglob("*.gguf") if file.read_bytes() == content]
        return [*stored, object_path(self.remote, md5(content))]


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def object_path(store: Path, digest: str) -> Path:
    return store / "files/md5" / digest[:2] / digest[2:]


@contextmanager
def changed(paths: Sequence[Path], content: bytes | None) -> Iterator[None]:
    """Files with another content for a while, or without any."""
    before = {path: path.read_bytes() for path in paths}
    for path in paths:
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    yield
    for path, kept in before.items():
        path.write_bytes(kept)


def make_files(folder: Path) -> Path:
    """What quantize_gguf and ollama_modelfile write."""
    (folder / "gguf").mkdir(parents=True)
    (folder / "ollama").mkdir()
    (folder / "gguf/model-Q8_0.gguf").write_bytes(Q8)
    (folder / "gguf/model-Q4_K_M.gguf").write_bytes(Q4)
    (folder / "ollama/Modelfile").write_text(render_modelfile(MODELFILE, context_tokens=2048))
    (folder / "ollama/template.gotmpl").write_text(TEMPLATE)
    return folder


def push(outs: Path, remote: Path) -> str:
    """Lay the GGUF folder into the remote as DVC does; returns its hash."""
    files = sorted((outs / "gguf").iterdir())
    listing = json.dumps([{"md5": md5(file.read_bytes()), "relpath": file.name} for file in files]).encode()
    contents = {f"{md5(listing)}.dir": listing} | {md5(file.read_bytes()): file.read_bytes() for file in files}
    for digest, content in contents.items():
        object_path(remote, digest).parent.mkdir(parents=True, exist_ok=True)
        object_path(remote, digest).write_bytes(content)
    return f"{md5(listing)}.dir"


def write_lock(lock: Path, outs: Path, folder_md5: str) -> Path:
    """A dvc.lock that names the GGUF folder."""
    sizes = [file.stat().st_size for file in (outs / "gguf").iterdir()]
    out = {"path": "models/gguf", "hash": "md5", "md5": folder_md5, "size": sum(sizes), "nfiles": len(sizes)}
    with lock.open("w") as handle:
        content = {"schema": "2.0", "stages": {"quantize_gguf": {"cmd": "x", "outs": [out]}}}
        YAML(typ="safe", pure=True).dump(content, handle)
    return lock


def make_registry(folder: Path, uri: str) -> Registered:
    """Both versions, with the files and tags that `register` gives them."""
    outs, remote, client = make_files(folder / "made"), folder / "remote", mlflow.MlflowClient(uri)
    lock = write_lock(folder / "dvc.lock", outs, push(outs, remote))
    tags = {
        "gguf_sha256": sha256_tree(outs / "gguf"),
        "ollama_sha256": sha256_tree(outs / "ollama"),
        "dvc_lock_sha256": lock_sha256(lock),
        "git.commit": "none",
    }
    experiment = client.create_experiment("x", artifact_location=str(folder / "artifacts"))
    client.create_registered_model(NAME)
    runs = []
    for alias in ("champion", "challenger"):
        run_id = client.create_run(experiment).info.run_id
        client.log_artifact(run_id, str(lock))
        client.log_artifacts(run_id, str(outs / "ollama"), "ollama")
        if alias == "challenger":
            client.log_artifacts(run_id, str(outs / "gguf"), "gguf")
        entry = client.create_model_version(NAME, str(outs), run_id, tags=tags)
        client.set_registered_model_alias(NAME, alias, entry.version)
        runs.append(run_id)
    return Registered(outs, remote, folder / "artifacts", runs, client, uri)


def make_clone(folder: Path, remote: Path | None) -> Path:
    """A clone without git, whose DVC has an empty cache and perhaps a default remote."""
    (folder / ".dvc").mkdir(parents=True)
    lines = ["[core]", "    no_scm = true", "    analytics = false"]
    if remote is not None:
        lines += ["    remote = team", "['remote \"team\"']", f"    url = {remote}"]
    (folder / ".dvc/config").write_text("\n".join(lines) + "\n")
    return folder


def use_clone(clone: Path, registered: Registered, patch: pytest.MonkeyPatch) -> None:
    """Let the current folder be this clone, and its registry that one."""
    patch.setenv("DVC_ROOT", str(clone))
    patch.setenv("MLFLOW_TRACKING_URI", registered.uri)
    patch.setenv("DVC_SITE_CACHE_DIR", str(clone / "site"))
    patch.chdir(clone)
