"""adapter and base -> models/merged, reloaded strictly, measured beside base + adapter and the model of training."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from finetune.data.row_groups import read_batches
from finetune.evaluation.divergence import divergence
from finetune.evaluation.generation import choose_rows
from finetune.evaluation.perplexity import all_logits, largest_difference, model_logits
from finetune.export import merge as merging
from finetune.export.four_bit import DEQUANTIZED, ways_to_merge
from finetune.export.merged_files import write_tokenizer
from finetune.io import write_json
from finetune.log import logger
from finetune.sections import Merge
from finetune.stages._main import stage_main
from finetune.training.device import choose_device, dtype_named, make_deterministic
from finetune.training.method import load_trained
from finetune.training.model import locate_base
from finetune.training.trained_on import read_trained_on, to_device_with_room
from finetune.training.vocabulary import EXTENSION_FILE, read_extension

PARAMS = ("seed", "cpu_threads", "merge")
PROBES_PER_SOURCE, PROBE_TOKENS = 2, 256


def run(
    adapter: Path,
    base: Path,
    tokenizer: Path,
    split: Path,
    target: Path,
    metrics: Path,
    *,
    seed: int,
    cpu_threads: int,
    merge: Merge,
) -> None:
    """Merge, and prove it beside base + adapter; where training was in 4 bit, measure both ways beside that model."""
    make_deterministic(seed, cpu_threads)
    four_bit, weights, extension = read_trained_on(adapter, base), locate_base(base), read_extension(tokenizer)
    ways, sources = ways_to_merge(four_bit, merge.onto), (weights, adapter, merge.dtype, extension.ids)
    merging.check_memory(weights, merge.compare_dtype, beside_bytes=len(ways) - 1)
    merging.check_disk(weights, target, merge.dtype)
    counts = merging.merge_shards(weights, adapter, target, merge.dtype, extension.ids, ways[merge.onto])
    write_tokenizer(weights, tokenizer, target, EXTENSION_FILE)
    counts["size_bytes"] = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    probes = [row["input_ids"][:PROBE_TOKENS] for row in choose_rows(_rows(split), PROBES_PER_SOURCE)]
    probes += merging.texts_of_new_tokens(extension.ids)
    dtype, load = dtype_named(merge.compare_dtype), partial(load_trained, base, adapter, extension)
    expected = all_logits(load(four_bit if merge.onto == DEQUANTIZED else None, dtype, torch.device("cpu")), probes)
    merged = merging.reload(target, dtype)
    difference = largest_difference(expected, all_logits(merged, probes))
    merging.check_difference(difference, merge.max_logit_difference)
    numbers: dict[str, Any] = {**counts, "max_logit_difference": difference, "onto": merge.onto}
    if four_bit is not None:
        live = load(four_bit, dtype_named(four_bit["dtype"]), device := choose_device())
        rows = sorted(choose_rows(_rows(split), merge.compare_rows), key=lambda row: str(row["id"]))
        models = merging.each_way(to_device_with_room(merged, device), ways, merge.onto, *sources)
        numbers["compare"] = {
            way: divergence(model_logits(live), model_logits(model), rows[: merge.compare_rows], f"trained, {way}")
            for way, model in models
        }
    write_json(metrics, numbers)
    logger.info("%s", merging.summary_line(numbers, merge.max_logit_difference))


def _rows(split: Path) -> Iterator[dict[str, Any]]:
    for batch in read_batches(split / "test.parquet"):
        yield from batch.to_pylist()


if __name__ == "__main__":
    stage_main(run, PARAMS)
