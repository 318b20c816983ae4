"""evaluate: base and tuned model on the held-out test rows -> perplexity and accuracy by source, sample answers."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from finetune.evaluation import generation, perplexity, report
from finetune.io import read_parquet, write_csv, write_json, write_jsonl
from finetune.log import logger
from finetune.sections import Evaluate, TrainQlora
from finetune.stages._main import stage_main
from finetune.training.device import check_hardware, choose_device, dtype_named, make_deterministic
from finetune.training.model import attach_adapter, load_extended
from finetune.training.vocabulary import read_extension

PARAMS = ("seed", "cpu_threads", "evaluate", "train_qlora")


def run(
    split: Path,
    tokenizer: Path,
    base: Path,
    adapter: Path,
    target: Path,
    metrics: Path,
    plot: Path,
    *,
    seed: int,
    cpu_threads: int,
    evaluate: Evaluate,
    train_qlora: TrainQlora,
) -> None:
    """Measure the adapter on the weights it was trained on: base is the same model with its adapter switched off."""
    make_deterministic(seed, cpu_threads)
    device = choose_device()
    check_hardware(train_qlora, device)
    words = AutoTokenizer.from_pretrained(tokenizer)
    rows = read_parquet(split / "test.parquet")
    dtype = dtype_named(train_qlora.compute_dtype)
    model = load_extended(base, read_extension(tokenizer), train_qlora.quantization, dtype, device)
    model = attach_adapter(model, adapter)
    chosen = generation.choose_rows(rows, evaluate.samples_per_source)
    limit = evaluate.max_new_tokens
    tuned = perplexity.score_by_source(perplexity.model_logits(model), rows, "tuned")
    tuned_answers = generation.answers(model, words, chosen, limit, "tuned answers")
    with model.disable_adapter():
        untuned = perplexity.score_by_source(perplexity.model_logits(model), rows, "base")
        base_answers = generation.answers(model, words, chosen, limit, "base answers")
    numbers = report.side_by_side(untuned, tuned)
    write_json(metrics, numbers)
    write_csv(plot, ("source", "model", "perplexity"), report.perplexity_rows(numbers))
    write_jsonl(target / "samples.jsonl", report.sample_rows(chosen, base_answers, tuned_answers, words))
    logger.info(
        "test perplexity %.2f base, %.2f tuned (ratio %.3f) on %d tokens",
        numbers["base"]["perplexity"],
        numbers["tuned"]["perplexity"],
        numbers["perplexity_ratio"],
        numbers["tuned"]["tokens"],
    )


if __name__ == "__main__":
    stage_main(run, PARAMS)
