"""a finished training -> .cache/run_card.json: on what, with what and how fast it ran.

What a machine does in a night is no result of the pipeline, so neither git nor DVC keeps this file: equal adapters
come from unequal machines. It names its adapter by SHA-256 and is shown beside that adapter only.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from finetune.errors import TrackingError
from finetune.hardware import describe_hardware
from finetune.io import sha256_text, write_json
from finetune.lineage import NOT_IN_GIT, git_tags
from finetune.log import logger
from finetune.telemetry import read_samples, summarise

RUN_CARD_FILE = Path(".cache/run_card.json")
LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "safetensors", "mlflow")
# The only variables whose values are recorded: an environment holds tokens and passwords.
VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG", "CUDA_VISIBLE_DEVICES", "FINETUNE_IMAGE", "MKL_CBWR", "NCCL_ALGO", "NCCL_PROTO",
    "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
)  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """What a training came to: `attention` and `micro_batch_rows` as they were chosen, `processes` at once."""

    steps: int
    trained_tokens: int
    skipped_steps: int
    processes: int
    micro_batch_rows: int
    attention: str
    deterministic: bool
    device: str


def write_run_card(
    target: Path,
    trained: Trained,
    *,
    seed: int,
    params: Mapping[str, Any],
    hashes: Mapping[str, str],
    telemetry: Path,
    root: Path,
) -> None:
    """Write the card; `hashes`: SHA-256 of `split`, `base`, `tokenizer` and `adapter`; `params`: train_qlora's.

    `telemetry`: the file of `finetune.telemetry`, of which the times, speed and energy are taken. `root`: the
    repository, whose commit is recorded. To be called by the process that trained, which knows its peak memory.
    """
    summary = summarise(list(read_samples(telemetry)))
    card = {
        "hardware": describe_hardware(),
        "libraries": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "seed": seed,
        "sha256": {**hashes, "params": sha256_text(json.dumps(params, sort_keys=True))},
        "started": _utc(summary.get("started_s")),
        "ended": _utc(summary.get("ended_s")),
        **asdict(trained),
        "seconds": summary.get("seconds"),
        "resumes": summary.get("resumes"),
        "tokens_per_s": summary.get("tokens_per_s"),
        "energy_wh": summary.get("energy_wh"),
        "telemetry": summary.get("figures", {}),
        **_commit(root),
    }
    write_json(target, card)


def _utc(time_s: float | None) -> str | None:
    return None if time_s is None else datetime.fromtimestamp(time_s, UTC).isoformat(timespec="seconds")


def _commit(root: Path) -> dict[str, str]:
    try:
        tags = git_tags(root, [Path(name) for name in ("metrics", "plots", "dvc.lock")])
    except TrackingError as fault:
        # A night of training is not lost to a missing git.
        logger.warning("the run card names no commit: %s", fault.what)
        return {"git_commit": NOT_IN_GIT, "git_dirty": NOT_IN_GIT}
    return {"git_commit": tags["git.commit"], "git_dirty": tags["git.dirty"]}
