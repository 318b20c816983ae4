"""A small DVC repository with one stage, train_qlora itself, and nodes at work in it as the job files start them."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from ruamel.yaml import YAML

from finetune.data.tables import PACKED, TOKENS, write_parquet
from finetune.io import sha256_tree

REPOSITORY = Path(__file__).resolve().parents[3]
LIMIT_S = 200.0
DEAD_SERVER = "http://127.0.0.1:9"
STAGE = """
stages:
  train_qlora:
    cmd: >-
      python -m finetune.stages.train_qlora data/split models/tokenizer models/base models/adapter
      metrics/train_qlora.json plots/train_log.csv
    params: [seed, cpu_threads, train_qlora]
    deps: [data/split, models/tokenizer, models/base]
    outs: [models/adapter]
    metrics: [metrics/train_qlora.json: {cache: false}]
    plots: [plots/train_log.csv: {cache: false}]
"""
TRAINING = {
    "batch_rows": 2,
    "micro_batch_rows": 1,
    "learning_rate": 0.03,
    "evaluate_every_steps": 4,
    "save_every_steps": 1,
    "distribution": {"strategy": "ddp", "processes": 2},
}


def make_repository(folder: Path, base: Path, tokenizer: Any, **training: Any) -> Path:
    """A repository whose inputs are there and whose stage has not run; `training` changes train_qlora's parameters."""
    folder.mkdir()
    for command in (["git", "init", "--quiet"], [sys.executable, "-m", "dvc", "init", "--quiet"]):
        subprocess.run(command, cwd=folder, check=True)
    config = (REPOSITORY / ".dvc/config").read_text(encoding="utf-8")
    (folder / ".dvc/config").write_text(config.replace("[core]\n", "[core]\n    site_cache_dir = .dvc/site\n"))
    yaml = YAML(typ="rt", pure=True)
    params = yaml.load((REPOSITORY / "recipes/smoke/params.yaml").read_text(encoding="utf-8"))
    params["train_qlora"] |= {**TRAINING, "epochs": 2, **training}
    with (folder / "params.yaml").open("w", encoding="utf-8") as handle:
        yaml.dump(params, handle)
    (folder / "dvc.yaml").write_text(STAGE, encoding="utf-8")
    (folder / "requirements").mkdir()
    shutil.copy(REPOSITORY / "requirements/train.txt", folder / "requirements")
    shutil.copytree(base, folder / "models/base")
    tokenizer.save_pretrained(folder / "models/tokenizer")
    write_parquet(folder / "data/split/packed.parquet", packed_rows(), PACKED)
    write_parquet(folder / "data/split/validation.parquet", validation_rows(), TOKENS)
    return folder


def packed_rows() -> list[dict[str, Any]]:
    """Eight rows of ids 3 to 28 between BOS and EOS, all trained."""
    rows = []
    for row in range(8):
        ids = [1, *((3 + (5 * row + at) % 26) for at in range(6)), 2]
        rows.append({"input_ids": ids, "labels": [-100, *ids[1:]], "seq_lengths": [8]})
    return rows


def validation_rows() -> list[dict[str, Any]]:
    ids = [1, 4, 9, 14, 2]
    names = {"id": "a", "source": "s", "group": "a", "language": None}
    return [{**names, "input_ids": ids, "trained": [False, True, True, True, True]}]


def two_free_ports() -> int:
    """A port that is free, as the next one is."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            try:
                second.bind(("127.0.0.1", first.getsockname()[1] + 1))
            except OSError:
                continue
            return int(first.getsockname()[1])


def clean_environment(**variables: str) -> dict[str, str]:
    """This environment without what an outer run has set, and with an MLflow that is not there."""
    outer = ("DVC_", "MLFLOW_", "MAKE", "FINETUNE_", "MASTER_", "SLURM_", "SKYPILOT_", "JOB_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    given = {"PATH": path, "PYTHONPATH": str(REPOSITORY / "src"), "DVC_NO_ANALYTICS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**kept, **given, "MLFLOW_TRACKING_URI": DEAD_SERVER, **variables}


class Nodes:
    """Nodes at work in one folder; what each has printed is in `<folder>/.cache/node-<rank>.txt`."""

    def __init__(
        self, folder: Path, commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]]
    ) -> None:
        (folder / ".cache").mkdir(exist_ok=True)
        self.logs = [folder / f".cache/node-{rank}.txt" for rank in range(len(commands))]
        self.processes = []
        for log, command, environment in zip(self.logs, commands, environments, strict=True):
            with log.open("wb") as out:
                self.processes.append(
                    subprocess.Popen(
                        command, cwd=folder, env=dict(environment), stdout=out, stderr=out, start_new_session=True
                    )
                )

    def codes(self) -> list[int]:
        """Wait for all of them; their exit codes."""
        until_s = time.monotonic() + LIMIT_S
        try:
            return [process.wait(max(0.1, until_s - time.monotonic())) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def kill(self, rank: int) -> None:
        """End everything that a node runs, as when its machine loses power."""
        node = psutil.Process(self.processes[rank].pid)
        for process in [node, *node.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def text(self) -> str:
        """What all of them have printed."""
        return "\n".join(f"--- {log.name}\n{log.read_text(encoding='utf-8')}" for log in self.logs)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Return once it holds, while the nodes work."""
        until_s = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < until_s, self.text()
            assert all(process.poll() is None for process in self.processes), self.text()
            time.sleep(0.05)


def start_nodes(folder: Path, count: int = 2) -> Nodes:
    """The program of every node, each with its number."""
    port = str(two_free_ports())
    shared = {"FINETUNE_NODES": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environments = [clean_environment(**shared, FINETUNE_NODE_RANK=str(rank)) for rank in range(count)]
    return Nodes(folder, [[sys.executable, "-m", "finetune.multi_node"]] * count, environments)


def outs(folder: Path) -> dict[str, str]:
    """Path -> SHA-256 of what the stage has made, and of what DVC says of it."""
    names = ("models/adapter", "metrics/train_qlora.json", "plots/train_log.csv", "dvc.lock")
    return {name: sha256_tree(folder / name) for name in names}
