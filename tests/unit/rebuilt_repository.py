"""A repository with a pipeline of three small stages, which has run, and a registered version of what it made."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from lineage_repository import commit, git

from finetune.lineage import Outputs, content_tags, lock_sha256

ROOT = Path(__file__).parents[2]
NAME = "finetune-smoke"
# NOISE is what another kind of machine would do to the bytes; STOP is a file that lets the last stage go on.
MAKE = """
import json, os, pathlib, sys, time
def write(path, text):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
seed = [line for line in open("params.yaml") if line.startswith("seed")][0]
if sys.argv[1] == "fetch":
    write("data/raw/manifest.json", "{}")
    write("data/base_manifest.json", json.dumps({"kind": "scratch"}))
    write("metrics/fetch.json", "{}")
elif sys.argv[1] == "clean":
    write("data/clean/records.jsonl", pathlib.Path("data/raw/manifest.json").read_text() + seed)
else:
    open(os.environ.get("STARTED", os.devnull), "a").write("x")
    while os.environ.get("WAIT") and not os.path.exists(os.environ["WAIT"]):
        time.sleep(0.05)
    for out in ("base", "adapter", "merged", "gguf", "ollama"):
        write(f"models/{out}/Modelfile", out + seed + os.environ.get("NOISE", ""))
"""
PIPELINE = """
stages:
  fetch:
    cmd: python make.py fetch
    deps: [make.py]
    outs: [data/raw, data/base_manifest.json]
    metrics: [metrics/fetch.json: {cache: false}]
  clean:
    cmd: python make.py clean
    params: [seed]
    deps: [make.py, data/raw]
    outs: [data/clean]
  train_qlora:
    cmd: python make.py train
    params: [seed]
    deps: [make.py, data/clean]
    outs: [models/base, models/adapter, models/merged, models/gguf, models/ollama]
"""
IGNORED = "/data/\n/models/\n/.cache/\n__pycache__\n/mlflow.db*\n"


@dataclass(frozen=True)
class Repository:
    """Its folder, the registry of its versions, and the run of version 1."""

    folder: Path
    client: Any
    uri: str
    tags: Mapping[str, str]

    def add_version(self, changes: Mapping[str, str], files: Mapping[str, str]) -> str:
        """Register the outs again, with other tags or other files of the run; returns its name."""
        experiment = self.client.get_experiment_by_name("x")
        run_id = self.client.create_run(experiment.experiment_id).info.run_id
        for name in ("dvc.lock", "params.yaml"):
            self.client.log_text(run_id, files.get(name) or (self.folder / name).read_text(), name)
        entry = self.client.create_model_version(NAME, "x", run_id, tags={**self.tags, **changes})
        return f"{NAME}/{entry.version}"


def environment(folder: Path, uri: str, **variables: str) -> dict[str, str]:
    """Of a process that works in this repository."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "DVC_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {"PATH": path, "PYTHONPATH": str(ROOT / "src"), "MLFLOW_TRACKING_URI": uri, "DVC_NO_ANALYTICS": "1"}
    return {
        **inherited,
        **own,
        "FINETUNE_TOOLS": str(folder),
        "DVC_SITE_CACHE_DIR": str(folder.parent / "site"),
        **variables,
    }


def run(repository: Repository, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python -m finetune.rebuild` in the repository."""
    command = [sys.executable, "-m", "finetune.rebuild", *arguments]
    variables = environment(repository.folder, repository.uri, **variables)
    return subprocess.run(command, cwd=repository.folder, env=variables, capture_output=True, text=True, check=False)


def outputs(root: Path) -> Outputs:
    return Outputs(
        adapter=root / "models/adapter",
        merged=root / "models/merged",
        gguf=root / "models/gguf",
        ollama=root / "models/ollama",
        base=root / "models/base",
        base_manifest=root / "data/base_manifest.json",
        raw_manifest=root / "data/raw/manifest.json",
        metrics=root / "metrics",
        plots=root / "plots",
        dvc_lock=root / "dvc.lock",
    )


def make_repository(folder: Path, uri: str) -> Repository:
    """Run the pipeline, commit, and register version 1 under the alias `champion`."""
    folder.mkdir()
    git(folder, "init", "--quiet")
    (folder / ".dvc").mkdir()
    (folder / ".dvc/config").write_text("[core]\n    analytics = false\n")
    (folder / ".gitignore").write_text(IGNORED)
    (folder / "make.py").write_text(MAKE)
    (folder / "dvc.yaml").write_text(PIPELINE)
    (folder / "params.yaml").write_text("seed: 42\n")
    (folder / "requirements").mkdir()
    for name in ("data", "train", "export", "llama-build", "llama-sdist", "lock"):
        shutil.copyfile(ROOT / f"requirements/{name}.txt", folder / f"requirements/{name}.txt")
    command = [sys.executable, "-m", "dvc", "repro", "--quiet"]
    subprocess.run(command, cwd=folder, env=environment(folder, uri), check=True)
    made_from = commit(folder, "Run")
    client = mlflow.MlflowClient(uri)
    client.create_experiment("x", artifact_location=str(folder.parent / "artifacts"))
    client.create_registered_model(NAME)
    tags = {**content_tags(outputs(folder)), "git.commit": made_from, "git.dirty": "false"}
    repository = Repository(folder, client, uri, {**tags, "dvc_lock_sha256": lock_sha256(folder / "dvc.lock")})
    repository.add_version({}, {})
    client.set_registered_model_alias(NAME, "champion", "1")
    return repository
