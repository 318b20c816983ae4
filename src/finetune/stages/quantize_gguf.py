"""quantize_gguf: merged model -> models/gguf, one file per type, each with its measured loss and its budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from finetune.evaluation import report
from finetune.evaluation.perplexity import measure_beside, model_logits
from finetune.export import gguf
from finetune.export.merge import count_parameters
from finetune.io import read_json, read_parquet, write_csv, write_json
from finetune.log import logger
from finetune.sections import QuantizeGguf
from finetune.stages._main import stage_main
from finetune.training.device import choose_device, dtype_named, make_deterministic

PARAMS = ("seed", "cpu_threads", "recipe", "quantize_gguf")
PLOT_COLUMNS = ("type", "perplexity_ratio", "size_bytes")


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
    dtype, types = read_json(merged / "config.json")["dtype"], [entry.type for entry in quantize_gguf.types]
    target.mkdir(parents=True, exist_ok=True)
    gguf.check_disk(count_parameters(merged), 8 * dtype_named(dtype).itemsize, types, target)
    whole = target / ".whole.gguf"
    files: dict[str, Path] = {name: target / f"model-{name}.gguf" for name in types}
    try:
        gguf.convert(merged, whole, gguf.OUT_TYPES[dtype], f"finetune-{recipe}")
        for name, file in files.items():
            gguf.quantize(whole, file, name, cpu_threads)
    finally:
        whole.unlink(missing_ok=True)
    numbers = _measure(merged, files, split, cpu_threads)
    write_json(metrics, numbers)
    rows = [(name, *(each[key] for key in PLOT_COLUMNS[1:])) for name, each in numbers["types"].items()]
    write_csv(plot, PLOT_COLUMNS, rows)
    gguf.check_budgets(quantize_gguf, numbers["types"])
    ratios = ", ".join(f"{name} {each['perplexity_ratio']:.4f}" for name, each in numbers["types"].items())
    logger.info("perplexity ratio to merged (%.3f): %s", numbers["merged_perplexity"], ratios)


def _measure(merged: Path, files: dict[str, Path], split: Path, threads: int) -> dict[str, Any]:
    device = choose_device()
    dtype = torch.float32 if device.type == "cpu" else dtype_named(read_json(merged / "config.json")["dtype"])
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=dtype, device_map={"": device}, local_files_only=True)
    rows = [row for row in read_parquet(split / "test.parquet") if any(row["trained"][1:])]
    longest = max(len(row["input_ids"]) for row in rows)
    others = {name: gguf.llama_logits(gguf.load(file, longest, threads)) for name, file in files.items()}
    whole, types = measure_beside(model_logits(model.eval()), others, rows, "merged and GGUF")
    made = {
        name: {"size_bytes": file.stat().st_size, "tensor_types": gguf.tensor_types(file)}
        for name, file in files.items()
    }
    figures = {name: report.quantised_figures(each, whole["perplexity"]) for name, each in types.items()}
    return {"merged_perplexity": whole["perplexity"], "types": {name: figures[name] | made[name] for name in files}}


if __name__ == "__main__":
    stage_main(run, PARAMS)
