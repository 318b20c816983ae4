"""Versions for the gate, small and by hand: what their runs recorded, alone or in a registry."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.evaluation.group_scores import COLUMNS
from finetune.io import write_csv
from finetune.tracking.client import find_experiment, log_now, log_params
from finetune.tracking.gate import Evidence, GroupScore

NAME = "finetune-smoke"
METRICS: dict[str, float] = {
    "train_loss": 2.0,
    "evaluate.perplexity_ratio": 0.8,
    "evaluate.perplexity_ratio_interval.low": 0.7,
    "evaluate.perplexity_ratio_interval.high": 0.9,
    "ollama_modelfile.parity": 1.0,
    "quantize_gguf.types.F16.perplexity_ratio": 1.0,
    "quantize_gguf.types.F16.mean_kl": 0.0,
    "quantize_gguf.types.F16.top1_agreement": 1.0,
    "quantize_gguf.types.Q8_0.perplexity_ratio": 1.0005,
    "quantize_gguf.types.Q8_0.mean_kl": 0.00008,
    "quantize_gguf.types.Q8_0.top1_agreement": 0.99,
}
PARAMS: dict[str, str] = {
    "seed": "42",
    "evaluate.bootstrap_resamples": "1000",
    "quantize_gguf.types.0.type": "F16",
    "quantize_gguf.types.0.max_perplexity_ratio": "1.005",
    "quantize_gguf.types.0.max_mean_kl": "0.001",
    "quantize_gguf.types.0.min_top1_agreement": "0.99",
    "quantize_gguf.types.1.type": "Q8_0",
    "quantize_gguf.types.1.max_perplexity_ratio": "1.01",
    "quantize_gguf.types.1.max_mean_kl": "0.005",
    "quantize_gguf.types.1.min_top1_agreement": "0.97",
}


def scores(
    nats_per_token: float, *, count: int = 30, tokens: int = 10, size_bytes: int = 40, noise: Sequence[float] = ()
) -> dict[str, GroupScore]:
    """Groups of rows that are hard or easy for every model: their number adds up to 2 nats a token."""
    added = [*noise, *([0.0] * (count - len(noise)))]
    return {
        f"rows {number}": GroupScore(tokens, size_bytes, tokens * (nats_per_token + 2 * number / count + added[number]))
        for number in range(count)
    }


def without(figures: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if name != key}


def evidence(
    version: str,
    *,
    metrics: Mapping[str, float] = METRICS,
    params: Mapping[str, str] = PARAMS,
    groups: Mapping[str, GroupScore] | None = None,
) -> Evidence:
    return Evidence(version, metrics, params, scores(2.0) if groups is None else groups)


def register(
    client: Any, nats_per_token: float, *, metrics: Mapping[str, float] = METRICS, page: str = "A page.\n"
) -> str:
    """A version whose run recorded these figures, as challenger; returns its number."""
    run_id = client.create_run(find_experiment(client, "finetune")).info.run_id
    log_now(client, run_id, [(0, key, value) for key, value in metrics.items()])
    log_params(client, run_id, PARAMS)
    rows = [("chat", key, each.tokens, each.size_bytes, 0.0, each.nats) for key, each in scores(nats_per_token).items()]
    with tempfile.TemporaryDirectory() as folder:
        write_csv(Path(folder) / "test_scores.csv", COLUMNS, rows)
        client.log_artifact(run_id, f"{folder}/test_scores.csv", "evaluation")
    if not client.search_registered_models(f"name = '{NAME}'"):
        client.create_registered_model(NAME)
    source = client.get_run(run_id).info.artifact_uri
    number = str(client.create_model_version(NAME, source, run_id, description=page).version)
    client.set_registered_model_alias(NAME, "challenger", number)
    return number
