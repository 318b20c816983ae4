"""A small repository whose last commit records a GGUF, and the GGUF, copied elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from finetune import origin

DIGEST = "0" * 64
SAMPLE_MD5 = "987a1b4d7bf340132bb13dc87b929cb5.dir"
SOURCE = {
    "name": "chats é\x1b[31m",
    "use": "training",
    "license": "MIT",
    "origin": "hub:org/set/*.jsonl",
    "revision": "c0ffee",
    "files": 2,
    "size_bytes": 1234567,
    "sha256": DIGEST,
}
PROVENANCE = {
    "general.name": "finetune-smoke",
    "general.license": "MIT",
    "finetune.recipe": "smoke",
    "finetune.params": json.dumps({"seed": 42, "train_qlora": {"epochs": 5, "lora": {"rank": 32}}}),
    "finetune.data_sha256": DIGEST,
    "finetune.data_sources": json.dumps([SOURCE]),
    "finetune.base.kind": "hub",
    "finetune.base.repo": "Qwen/Qwen2.5-0.5B",
    "finetune.base.revision": "abcdef",
    "finetune.adapter_sha256": "1" * 64,
    "finetune.merged_sha256": "2" * 64,
    "finetune.package.torch": "2.13.0",
}
PARAMS = "seed: 42\ntrain_qlora: {epochs: 5}\n"
MAKEFILE = "repro:\n\t@mkdir -p models/gguf && cp made.bin models/gguf/model-Q8_0.gguf\n"


def write_gguf(path: Path, keys: dict[str, str]) -> Path:
    writer = GGUFWriter(str(path), "llama")
    for key, value in keys.items():
        writer.add_string(key, value)
    writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def git(folder: Path, *arguments: str) -> str:
    identity = {f"GIT_{role}_{key}": "x" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
    environment = {**os.environ, **identity, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def md5(text: str) -> str:
    return hashlib.md5(text.encode()).hexdigest()  # noqa: S324 (DVC's hash)


def commit(folder: Path, subject: str) -> str:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", subject)
    return git(folder, "rev-parse", "HEAD")


def lock(folder: Path, epochs: int = 5) -> None:
    """A dvc.lock of one stage that read train.py and wrote the metrics, as they lie there now."""
    deps = [{"path": "train.py", "hash": "md5", "md5": md5((folder / "train.py").read_text())}]
    deps.append({"path": "data/raw", "hash": "md5", "md5": "ff.dir"})
    # The hash that DVC 3.67 gave this folder: a.txt with "a", and b/c.txt with "c".
    deps.append({"path": "sample", "hash": "md5", "md5": SAMPLE_MD5})
    metrics = "metrics/quantize_gguf.json"
    outs = [{"path": metrics, "hash": "md5", "md5": md5((folder / metrics).read_text())}]
    params = {"params.yaml": {"seed": 42, "train_qlora.epochs": epochs}}
    stage = {"cmd": "x", "deps": deps, "params": params, "outs": outs}
    register = {"cmd": "y", "deps": [{"path": "train.py", "md5": "of another machine"}]}
    (folder / "dvc.lock").write_text(json.dumps({"stages": {"quantize_gguf": stage, "register": register}}))


def later(folder: Path) -> None:
    (folder / "metrics/quantize_gguf.json").write_text('{"types": {}}')
    lock(folder)
    commit(folder, "After")


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert origin.main(arguments) == 0
    return capsys.readouterr().out


def make_repository(folder: Path, made: Path) -> None:
    """Its metrics name the SHA-256 of `made`, and are not committed yet."""
    (folder / "metrics").mkdir(parents=True)
    git(folder, "init", "--quiet")
    (folder / "params.yaml").write_text(PARAMS)
    (folder / "train.py").write_text("# train\n")
    (folder / "Makefile").write_text(MAKEFILE)
    (folder / "sample/b").mkdir(parents=True)
    (folder / "sample/a.txt").write_text("a")
    (folder / "sample/b/c.txt").write_text("c")
    (folder / "made.bin").write_bytes(made.read_bytes())
    (folder / "metrics/quantize_gguf.json").write_text('{"types": {}}')
    lock(folder)
    commit(folder, "Before")
    digest = hashlib.sha256(made.read_bytes()).hexdigest()
    figures = {"Q8_0": {"sha256": digest, "perplexity_ratio": 1.0012, "top1_agreement": 0.987}}
    figures["F16"] = {"sha256": "3" * 64, "perplexity_ratio": 1.0, "top1_agreement": 1.0}
    (folder / "metrics/quantize_gguf.json").write_text(json.dumps({"types": figures}))
    lock(folder)
