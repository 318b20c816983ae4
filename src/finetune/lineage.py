"""stage outputs, params.yaml, dvc.lock, git -> hashes, tags and flat figures of a registered version.

Imports no mlflow: what is recorded is decided here, where it is recorded in tracking/.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from finetune.errors import DataError, TrackingError
from finetune.io import read_json, sha256_file, sha256_text, sha256_tree
from finetune.params import Params

PACKAGES = (
    "torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "llama-cpp-python", "mlflow"
)  # fmt: skip
NOT_IN_GIT = "none"
MIB = 1 << 20
MAX_PARAM_CHARACTERS = 6000
# Greedy up to the last @ of a word: a password that was not percent-encoded may hold / and @ itself.
USERINFO = re.compile(r"(?<=://)[^\s'\"]*@")
SECRET_QUERY = re.compile(r"(?i)([?&][\w-]*(?:password|passwd|token|secret)=)[^&\s'\"]+")
# The tags that say from which state of the repository a version was registered.
# What MLflow allows in the name of a metric.
NOT_IN_NAMES = re.compile(r"[^\w.\- :/]", re.ASCII)

SOURCE_TAGS = ("git.commit", "git.dirty", "dvc_lock_sha256")


@dataclass(frozen=True)
class Outputs:
    """Where the hashed and described outputs lie."""

    adapter: Path
    merged: Path
    gguf: Path
    ollama: Path
    base: Path
    base_manifest: Path
    raw_manifest: Path
    metrics: Path
    plots: Path
    dvc_lock: Path


@dataclass(frozen=True)
class DatasetFacts:
    """One source of the training data; `sha256` is over its files' names and hashes, the rest is JSON for MLflow."""

    name: str
    sha256: str
    source: str
    profile: str


def repository_root() -> Path:
    """The folder of dvc.yaml: DVC_ROOT inside a stage, else the current folder."""
    return Path(os.environ.get("DVC_ROOT") or Path.cwd()).absolute()


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, else mlflow.db in the repository: MLflow's own default depends on what lies in the cwd."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{repository_root() / 'mlflow.db'}"


def artifact_folder() -> str | None:
    """Where a database beside the repository keeps its artifacts; None with a server, which decides that itself."""
    return str(repository_root() / "mlartifacts") if tracking_uri().startswith("sqlite:") else None


def without_passwords(text: str) -> str:
    """The text with `***` for user names and passwords of the addresses in it."""
    return SECRET_QUERY.sub(r"\1***", USERINFO.sub("***@", text))


def shown_uri() -> str:
    """`tracking_uri` as it may be printed."""
    return without_passwords(tracking_uri())


def first_line(fault: BaseException) -> str:
    """The start of an error's message as it may be printed, or the error's name where it has none."""
    # SQLAlchemy puts a hint of its own above what the database said.
    lines = [line for line in str(fault).strip().splitlines() if not line.startswith("(raised as a result of")]
    return without_passwords(lines[0] if lines else type(fault).__name__)[:200]


def new_source(known: Mapping[str, str], present: Mapping[str, str]) -> dict[str, str]:
    """The SOURCE_TAGS of `present` where `known` was registered from changed files and `present` is a clean commit."""
    better = known.get("git.dirty") != "false" and present["git.dirty"] == "false"
    return {key: present[key] for key in SOURCE_TAGS} if better else {}


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings, and lists of mappings, to one level with dotted keys; other lists become JSON."""
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        value = {str(number): item for number, item in enumerate(value)}
    if not isinstance(value, Mapping):
        return {prefix: json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(flatten(item, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def run_params(params: Params) -> dict[str, str]:
    """All params but `register` flat and as text; one too long for MLflow is cut and closed by its SHA-256."""
    values = flatten(params.model_dump(mode="json", exclude={"registration"}))
    texts = {key: str(value) for key, value in values.items()}
    return {
        key: text if len(text) <= MAX_PARAM_CHARACTERS else f"{text[:5900]} ... SHA-256 {sha256_text(text)}"
        for key, text in texts.items()
    }


def read_metrics(folder: Path) -> dict[str, float]:
    """The numbers of every metrics/*.json as `<stage>.<key>`; texts, truth values and nulls are left out."""
    flat = {path.stem: flatten(read_json(path), path.stem) for path in sorted(folder.glob("*.json"))}
    if not flat:
        raise DataError("no metrics", folder, "run `dvc repro`, which makes them")
    numbers = ((key, value) for entries in flat.values() for key, value in entries.items())
    # A reason may hold the name of any column: `filtered_lang(code)`.
    return {NOT_IN_NAMES.sub("_", key): float(value) for key, value in numbers if type(value) in (int, float)}


def read_curves(path: Path) -> dict[int, dict[str, float]]:
    """plots/train_log.csv as {step: {column: value}}; empty cells are left out."""
    try:
        with path.open(encoding="utf-8", newline="") as handle:
            rows = list(csv.DictReader(handle))
        return {int(row.pop("step")): {name: float(cell) for name, cell in row.items() if cell} for row in rows}
    except FileNotFoundError:
        raise DataError("file is missing", path, "run `dvc repro`, which makes it") from None
    except (KeyError, ValueError) as fault:
        raise DataError(f"not a training log: {fault}", path, "delete the file and run `dvc repro`") from None


def read_datasets(raw_manifest: Path) -> list[DatasetFacts]:
    """One entry per source of data/raw/manifest.json."""
    datasets = []
    for source in read_json(raw_manifest)["sources"]:
        files = sorted((file["path"], file["sha256"]) for file in source["files"])
        digest = sha256_text(json.dumps(files, ensure_ascii=False))
        place = {"origin": source["origin"], "revision": source["revision"], "sha256": digest}
        size_bytes = sum(file["size_bytes"] for file in source["files"])
        profile = {"files": len(files), "size_bytes": size_bytes}
        datasets.append(
            DatasetFacts(source["name"], digest, json.dumps(place, sort_keys=True), json.dumps(profile, sort_keys=True))
        )
    return datasets


def lock_sha256(dvc_lock: Path) -> str:
    """SHA-256 of dvc.lock without its `register` stage, which is written last; key order does not count."""
    try:
        lock = YAML(typ="safe", pure=True).load(dvc_lock.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError("file is missing", dvc_lock, "run `dvc repro`, which makes it") from None
    stages = {name: stage for name, stage in lock["stages"].items() if name != "register"}
    return sha256_text(json.dumps({**lock, "stages": stages}, sort_keys=True))


def git_tags(root: Path, generated: Sequence[Path]) -> dict[str, str]:
    """`git.commit`, and `git.dirty`: whether anything but `generated` differs from it; both `none` outside git.

    Raises TrackingError when git itself fails, as in a folder that another user owns.
    """
    inside = _git(root, "rev-parse", "--is-inside-work-tree")
    if inside.returncode and "not a git repository" in inside.stderr:
        return {"git.commit": NOT_IN_GIT, "git.dirty": NOT_IN_GIT}
    if inside.returncode:
        raise TrackingError(
            f"git failed: {inside.stderr.strip()}", root, "mend what git names, then run `make register`"
        )
    head = _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    excluded = [f":(exclude){path.as_posix()}" for path in generated]
    status = _git(root, "status", "--porcelain", "--", ".", *excluded)
    if status.returncode:
        raise TrackingError(
            f"git failed: {status.stderr.strip()}", root, "mend what git names, then run `make register`"
        )
    return {"git.commit": head.stdout.strip() or NOT_IN_GIT, "git.dirty": str(bool(status.stdout)).lower()}


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}
        )
    except FileNotFoundError:
        raise TrackingError("git is not installed", "PATH", "install git, then run `make register`") from None


def package_tags() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result."""
    versions = {f"package.{name}": version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **versions}


def content_tags(outputs: Outputs) -> dict[str, str]:
    """SHA-256 of data, base, adapter, merged model, GGUF and Ollama files, and `content_sha256` over all of them."""
    hashes = {
        "data_sha256": sha256_file(outputs.raw_manifest),
        "base_sha256": sha256_tree(outputs.base),
        "adapter_sha256": sha256_tree(outputs.adapter),
        "merged_sha256": sha256_tree(outputs.merged),
        "gguf_sha256": sha256_tree(outputs.gguf),
        "ollama_sha256": sha256_tree(outputs.ollama),
    }
    return {**hashes, "content_sha256": sha256_text(json.dumps(hashes, sort_keys=True))}


def served_tags(gguf: Path, ollama: Path, quantization: str) -> dict[str, str]:
    """What a server needs, each file by itself: the GGUF that the Modelfile names, and the SHA-256 of both."""
    served = gguf / f"model-{quantization}.gguf"
    return {
        "served_gguf": served.name,
        "served_gguf_sha256": sha256_file(served),
        "modelfile_sha256": sha256_file(ollama / "Modelfile"),
    }


def version_tags(outputs: Outputs, recipe: str, root: Path) -> dict[str, str]:
    """Every tag by which a registered version can be rebuilt."""
    base = read_json(outputs.base_manifest)
    sources = read_json(outputs.raw_manifest)["sources"]
    tags = {
        **content_tags(outputs),
        **git_tags(root, (outputs.metrics, outputs.plots, outputs.dvc_lock)),
        **package_tags(),
        "dvc_lock_sha256": lock_sha256(outputs.dvc_lock),
        "recipe": recipe,
        "licenses": json.dumps(sorted({source["license"] for source in sources}), ensure_ascii=False),
        "base.kind": base["kind"],
    }
    if base["kind"] == "hub":
        tags |= {"base.repo": base["repo_id"], "base.revision": base["revision"]}
    if image := os.environ.get("FINETUNE_IMAGE"):
        tags["container_image"] = image
    return tags


def figure(metrics: Mapping[str, float], key: str) -> float:
    """One number of `read_metrics`; raises DataError naming the file that should hold it."""
    if key not in metrics:
        stage, _, name = key.partition(".")
        remedy = f"run `dvc repro --force --single-item {stage}`"
        raise DataError(f"figure {name} is missing", f"metrics/{stage}.json", remedy)
    return metrics[key]


def quantized_types(metrics: Mapping[str, float]) -> list[str]:
    """The GGUF types that were made, largest file first."""
    prefix, suffix = "quantize_gguf.types.", ".size_bytes"
    entries = {key: size for key, size in metrics.items() if key.startswith(prefix) and key.endswith(suffix)}
    sizes = {key[len(prefix) : -len(suffix)]: size for key, size in entries.items()}
    if not sizes:
        raise DataError("no GGUF type", "metrics/quantize_gguf.json", "run `dvc repro`")
    return sorted(sizes, key=lambda name: (-sizes[name], name))
