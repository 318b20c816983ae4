"""quantize_gguf: merged model -> models/gguf, one file per type, each with its measured loss and its budget."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.data.row_groups import read_batches
from finetune.evaluation import quantization
from finetune.evaluation.perplexity import model_logits
from finetune.export import gguf
from finetune.export.gguf_types import describe
from finetune.export.importance import collect_importance
from finetune.export.provenance import describe_model
from finetune.export.speed import SPEED_FILE, measure_speed
from finetune.export.vocabulary_proof import prove_vocabulary
from finetune.export.weights import count_parameters
from finetune.io import read_json, read_jsonl, write_csv, write_json, write_jsonl
from finetune.log import logger
from finetune.stages._main import stage_main
from finetune.training.device import choose_device, dtype_named, make_deterministic

PARAMS = (
    "recipe", "seed", "cpu_threads", "fetch", "clean", "tokenizer", "base", "tokenize", "split", "train_qlora",
    "merge", "quantize_gguf",
)  # fmt: skip


def run(
    merged: Path,
    adapter: Path,
    base_manifest: Path,
    raw_manifest: Path,
    split: Path,
    evaluation: Path,
    target: Path,
    samples: Path,
    metrics: Path,
    plot: Path,
    /,
    **sections: Any,
) -> None:
    """Convert once, quantise to every type, and measure each on the test rows beside the merged model."""
    settings, threads = sections["quantize_gguf"], sections["cpu_threads"]
    make_deterministic(sections["seed"], threads)
    dtype = read_json(merged / "config.json")["dtype"]
    words = AutoTokenizer.from_pretrained(merged, trust_remote_code=False)
    files = gguf.plan_files(target, settings, count_parameters(merged), 8 * dtype_named(dtype).itemsize)
    origin, place = describe_model(merged, adapter, base_manifest, raw_manifest, sections), {"": choose_device()}
    held = gguf.reference_dtype(count_parameters(merged), dtype_named(dtype), place[""])
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=held, device_map=place, trust_remote_code=False).eval()
    with gguf.whole_gguf(merged, target, dtype, f"finetune-{sections['recipe']}", origin) as whole:
        prove_vocabulary(merged, whole)
        matrix = collect_importance(model, _rows(split / "train.parquet"), settings.importance_matrix_rows, whole)
        for name, file in files.items():
            gguf.quantize(whole, file, name, threads, matrix)
    prompts, rows = list(read_jsonl(evaluation / "prompts.jsonl")), partial(_rows, split / "test.parquet")
    context = quantization.context_tokens(rows(), prompts, model.config.max_position_embeddings)
    groups = gguf.opened_groups(files, context, model.config.vocab_size, threads)
    measured = quantization.measure_types(model_logits(model), groups, rows, prompts, words)
    made = {name: describe(file, name) for name, file in files.items()}
    write_json(metrics, numbers := quantization.metrics(measured, prompts, made))
    write_csv(plot, quantization.PLOT_COLUMNS, quantization.plot_rows(numbers["types"]))
    write_jsonl(samples / "samples.jsonl", quantization.sample_rows(prompts, measured.answers, words))
    speed = measure_speed(files, made, threads, SPEED_FILE)
    logger.info("beside the merged model:\n%s", quantization.table(numbers["types"], speed))
    quantization.check_budgets(settings, numbers["types"])


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for batch in read_batches(path):
        yield from batch.to_pylist()


if __name__ == "__main__":
    stage_main(run, PARAMS)
