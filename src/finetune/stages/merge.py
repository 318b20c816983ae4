"""adapter and 16-bit base -> models/merged, reloaded strictly and compared with base + adapter."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from finetune.chat_template import TRAINING_TEMPLATE
from finetune.errors import ExportError
from finetune.evaluation.generation import choose_rows
from finetune.evaluation.perplexity import all_logits, largest_difference
from finetune.export.merge import check_disk, check_memory, check_reload, merge_shards
from finetune.io import read_parquet, write_json
from finetune.log import logger
from finetune.sections import Merge
from finetune.stages._main import stage_main
from finetune.training.device import dtype_named, make_deterministic
from finetune.training.model import attach_adapter, load_extended, locate_base
from finetune.training.vocabulary import EXTENSION_FILE, read_extension

PARAMS = ("seed", "cpu_threads", "merge")
PROBES_PER_SOURCE, PROBE_TOKENS = 2, 64


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
    """Merge, then prove it: the largest logit difference to base + adapter stays within the stated bound."""
    make_deterministic(seed, cpu_threads)
    weights = locate_base(base)
    target.mkdir(parents=True, exist_ok=True)
    check_memory(weights, merge.compare_dtype)
    check_disk(weights, target, merge.dtype)
    extension = read_extension(tokenizer)
    counts = merge_shards(weights, adapter, target, merge.dtype, extension.ids)
    for file in sorted(tokenizer.iterdir()):
        if file.name not in (TRAINING_TEMPLATE, EXTENSION_FILE):
            shutil.copyfile(file, target / file.name)
    probes = [row["input_ids"] for row in choose_rows(read_parquet(split / "test.parquet"), PROBES_PER_SOURCE)]
    # Every new token is compared, whether or not a test row has it.
    probes += [list(extension.ids[at : at + PROBE_TOKENS]) for at in range(0, len(extension.ids), PROBE_TOKENS)]
    dtype, cpu = dtype_named(merge.compare_dtype), torch.device("cpu")
    expected = all_logits(attach_adapter(load_extended(base, extension, None, dtype, cpu), adapter), probes)
    merged, loading = AutoModelForCausalLM.from_pretrained(
        target, dtype=dtype, output_loading_info=True, use_safetensors=True, local_files_only=True
    )
    check_reload(loading, target)
    difference = largest_difference(expected, all_logits(merged.eval(), probes))
    if difference > merge.max_logit_difference:
        raise ExportError(
            f"merged logits differ from base + adapter by {difference:.4f}, more than {merge.max_logit_difference}",
            "merge.max_logit_difference",
            "set merge.dtype: float32, or raise the bound if the rounding of that dtype is acceptable",
        )
    size_bytes = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    write_json(metrics, {**counts, "max_logit_difference": difference, "size_bytes": size_bytes})
    logger.info(
        "%d of %d tensors changed, %s bytes, largest logit difference %.4f (bound %s)",
        counts["changed_tensors"],
        counts["tensors"],
        f"{size_bytes:,}",
        difference,
        merge.max_logit_difference,
    )


if __name__ == "__main__":
    stage_main(run, PARAMS)
