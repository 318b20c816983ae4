"""quantize_gguf: merged model -> models/gguf, one file per type, each with its measured loss and its budget."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from finetune.errors import ExportError
from finetune.evaluation import perplexity
from finetune.export import gguf
from finetune.io import read_json, read_parquet, write_csv, write_json
from finetune.log import logger
from finetune.sections import QuantizeGguf
from finetune.stages._main import stage_main
from finetune.training.device import make_deterministic

PARAMS = ("seed", "cpu_threads", "recipe", "quantize_gguf")


def run(
    merged: Path,
    split: Path,
    target: Path,
    metrics: Path,
    plot: Path,
    *,
    seed: int,
    cpu_threads: int,
    recipe: str,
    quantize_gguf: QuantizeGguf,
) -> None:
    """Convert once, quantise to every type, and measure each on the test rows beside the merged model."""
    make_deterministic(seed, cpu_threads)
    rows = [row for row in read_parquet(split / "test.parquet") if any(row["trained"][1:])]
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32, local_files_only=True).eval()
    reference = perplexity.model_logits(model)
    total = sum(perplexity.score_by_source(reference, rows, "merged").values(), perplexity.Score())
    numbers: dict[str, Any] = {"merged_perplexity": total.summary()["perplexity"], "types": {}}
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        whole = Path(folder) / "whole.gguf"
        gguf.convert(merged, whole, gguf.OUT_TYPES[read_json(merged / "config.json")["dtype"]], f"finetune-{recipe}")
        for entry in quantize_gguf.types:
            file = target / f"model-{entry.type}.gguf"
            gguf.quantize(whole, file, entry.type, cpu_threads)
            measured = _measure(file, reference, rows, cpu_threads)
            measured["perplexity_ratio"] = measured["perplexity"] / numbers["merged_perplexity"]
            numbers["types"][entry.type] = measured
    write_json(metrics, numbers)
    columns = ("type", "perplexity_ratio", "size_bytes")
    write_csv(plot, columns, [(name, *(each[key] for key in columns[1:])) for name, each in numbers["types"].items()])
    _check_budgets(quantize_gguf, numbers["types"])
    ratios = [f"{name} {each['perplexity_ratio']:.4f}" for name, each in numbers["types"].items()]
    logger.info("perplexity ratio to merged (%.3f): %s", numbers["merged_perplexity"], ", ".join(ratios))


def _measure(file: Path, reference: perplexity.LogitsOf, rows: list[Any], threads: int) -> dict[str, Any]:
    logits_of = gguf.llama_logits(gguf.load(file, max(len(row["input_ids"]) for row in rows), threads))
    measured = perplexity.measure_against(reference, logits_of, rows, file.name)
    return {**measured, "size_bytes": file.stat().st_size, "tensor_types": gguf.tensor_types(file)}


def _check_budgets(settings: QuantizeGguf, measured: dict[str, Any]) -> None:
    for entry in settings.types:
        ratio = measured[entry.type]["perplexity_ratio"]
        if ratio > entry.max_perplexity_ratio:
            raise ExportError(
                f"{entry.type} raises perplexity by a factor of {ratio:.4f}, more than {entry.max_perplexity_ratio}",
                "quantize_gguf.types",
                "raise its max_perplexity_ratio, or drop the type from the list",
            )


if __name__ == "__main__":
    stage_main(run, PARAMS)
