"""evaluate: base and tuned model on the held-out test rows and tasks -> scores with intervals, answers side by side."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pyarrow import parquet
from transformers import AutoTokenizer

from finetune.data.encoding.chat import Chat, render_record
from finetune.data.record import Record
from finetune.data.row_groups import read_batches
from finetune.data.vocabulary.tokenizer_files import load_chat
from finetune.evaluation import generation, group_scores, memorization, prompts, report
from finetune.io import write_csv, write_json, write_jsonl
from finetune.log import logger
from finetune.sections import Evaluate
from finetune.stages._main import stage_main
from finetune.training.device import check_hardware, choose_device, dtype_named, make_deterministic
from finetune.training.method import load_beside_base
from finetune.training.trained_on import read_trained_on
from finetune.training.vocabulary import read_extension
from finetune.training_sections import TrainQlora

PARAMS = ("seed", "cpu_threads", "evaluate", "train_qlora")


def run(
    split: Path,
    tokenizer: Path,
    base: Path,
    adapter: Path,
    target: Path,
    metrics: Path,
    perplexities: Path,
    ratios: Path,
    *,
    seed: int,
    cpu_threads: int,
    evaluate: Evaluate,
    train_qlora: TrainQlora,
) -> None:
    """Measure what was trained on the weights it was trained on: base is the same model without it."""
    make_deterministic(seed, cpu_threads)
    check_hardware(train_qlora, device := choose_device())
    words = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    chat, test = load_chat(tokenizer), split / "test.parquet"
    asker = prompts.Asker(words, sorted({chat.ids.eos, chat.stop[1]}), evaluate)
    asked = [*prompts.row_prompts(_rows(test), asker), *prompts.tool_call_prompts(asker, partial(_prompt_ids, chat))]
    four_bit, dtype = read_trained_on(adapter, base), dtype_named(train_qlora.compute_dtype)
    model = load_beside_base(base, adapter, read_extension(tokenizer), four_bit, dtype, device)
    answers, models = generation.base_and_tuned(model, words, asked), group_scores.base_and_tuned(model)
    scores = group_scores.score_groups(models, _rows(test), parquet.read_metadata(test).num_rows, chat.tokenizer)
    numbers = report.side_by_side(scores, evaluate.bootstrap_resamples, seed)
    copied = memorization.measure(answers, read_batches(split / "train.parquet"), evaluate.memorization_tokens)
    numbers["tasks"] = {**report.task_figures(asked, answers), "memorization": copied}
    write_json(metrics, numbers)
    write_csv(perplexities, report.PERPLEXITY_COLUMNS, report.perplexity_rows(numbers))
    write_csv(ratios, report.RATIO_COLUMNS, report.ratio_rows(numbers))
    write_csv(target / "test_scores.csv", group_scores.COLUMNS, group_scores.score_rows(scores, _rows(test)))
    write_jsonl(target / "prompts.jsonl", asked)
    write_jsonl(target / "samples.jsonl", report.sample_rows(asked, answers, asker.text))
    logger.info("%s", report.summary_line(numbers))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for batch in read_batches(path):
        yield from batch.to_pylist()


def _prompt_ids(chat: Chat, question: Record) -> list[int]:
    text = render_record(chat.template, question, add_generation_prompt=True).text
    return list(chat.tokenizer.encode(text, add_special_tokens=False).ids)


if __name__ == "__main__":
    stage_main(run, PARAMS)
