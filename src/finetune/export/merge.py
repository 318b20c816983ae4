"""base and adapter -> the merged model's files, tensor by tensor: memory holds some blocks of values, never a tensor.

Blocks are read, computed and written side by side on as many threads as torch has. Each is computed by one thread and
written at its own place, so that neither their number nor their order changes a byte.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from finetune.errors import ExportError
from finetune.export.four_bit import FourBit
from finetune.export.memory import free_memory_bytes
from finetune.export.merge_plan import planned
from finetune.export.merged_files import write_config, write_index
from finetune.export.weights import Planned, Workers, count_parameters, write_file
from finetune.log import progress, progress_bar

# Head room for the tokenizer, the index and the file system's own rounding.
DISK_MARGIN = 1.05
PROBE_TOKENS = 64


def check_memory(base: Path, dtype: str, beside_bytes: int) -> None:
    """Refuse, before anything is written, a comparison that would not fit into this machine's free memory.

    `beside_bytes`: for each parameter, what is held beside the model in `dtype`.
    """
    needed_bytes = count_parameters(base) * (getattr(torch, dtype).itemsize + beside_bytes)
    free_bytes = free_memory_bytes()
    if free_bytes < needed_bytes:
        raise ExportError(
            f"the comparison in {dtype} needs {needed_bytes:,} bytes of memory, and {free_bytes:,} are free",
            "merge.compare_dtype",
            "set merge.compare_dtype: bfloat16, or use a machine with more memory",
        )


def check_disk(base: Path, target: Path, dtype: str) -> None:
    """Refuse, before anything is written, a target whose disk cannot hold the merged model."""
    needed_bytes = int(count_parameters(base) * getattr(torch, dtype).itemsize * DISK_MARGIN)
    target.parent.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(target.parent).free
    if free_bytes < needed_bytes:
        raise ExportError(
            f"the merged model needs {needed_bytes:,} bytes, and {free_bytes:,} are free",
            target.parent,
            f"free at least {needed_bytes - free_bytes:,} bytes there, then `dvc repro`",
        )


def merge_shards(
    base: Path,
    adapter: Path,
    target: Path,
    dtype: str,
    trained_ids: Sequence[int],
    four_bit: FourBit | None = None,
) -> dict[str, int]:
    """Write the merged model's files and configuration below `target`; returns counts of tensors and of rows.

    `adapter`: or the model that a full fine-tuning made of the base. `trained_ids`: tokens of an extended vocabulary,
    whose rows the adapter must hold; empty for the base's own.
    `four_bit`: merge onto the values that training saw; None for the base's own. Raises ExportError when an update
    finds no weight, is not finite, or changes nothing, and when rows are missing.
    """
    target.mkdir(parents=True, exist_ok=True)
    with planned(base, adapter, getattr(torch, dtype), trained_ids, four_bit) as plan, _workers() as workers:
        total = sum(each.size_bytes for tensors in plan.files.values() for each in tensors.values())
        with progress_bar(total, 0, "B", "merge") as bar, ThreadPoolExecutor(1) as finisher:

            def done(tensor: Planned) -> None:
                plan.check_changed(tensor.name)
                bar.update(tensor.size_bytes)

            finishing = [
                finisher.submit(write_file(target / shard, tensors, workers, done))
                for shard, tensors in sorted(plan.files.items())
            ]
            for future in finishing:
                future.result()
        if not plan.changed & plan.updates.keys():
            raise ExportError(
                "the merged model has every value of the base: training changed none, or by less than dtype can hold",
                adapter,
                "train for more steps or with a higher train_qlora.learning_rate, or set merge.dtype: float32",
            )
        write_index(base, target, plan.files)
        write_config(base, target, dtype, plan.table_rows, tied=plan.tied)
        return {
            "tensors": sum(map(len, plan.files.values())),
            "changed_tensors": len(plan.changed & plan.updates.keys()),
            "new_tokens": len(trained_ids),
        }


def each_way(
    model: Any,
    ways: Mapping[str, FourBit | None],
    first: str,
    base: Path,
    adapter: Path,
    dtype: str,
    trained_ids: Sequence[int],
) -> Iterator[tuple[str, Any]]:
    """The merged model `model`, which `merge_shards` made the way `first`, and then as the other ways would make it.

    It is changed in place: no further file, and no more memory. Only weights that were 4-bit in training differ.
    """
    yield first, model
    parameters = dict(model.named_parameters())
    names = {name for four_bit in ways.values() if four_bit is not None for name in four_bit.weights}
    for way in sorted(set(ways) - {first}):
        with planned(base, adapter, getattr(torch, dtype), trained_ids, ways[way]) as plan, _workers() as workers:
            tensors = [each for tensors in plan.files.values() for each in tensors.values() if each.name in names]
            for tensor in progress(tensors, len(tensors), "tensor", f"merge onto {way}"):
                tensor.prepare().each(workers, partial(_set_values, parameters[tensor.name].data.view(-1)))
        yield way, model


def _set_values(weight: torch.Tensor, first: int, values: torch.Tensor) -> None:
    weight[first : first + len(values)] = values.to(weight)


@contextmanager
def _workers() -> Iterator[Workers]:
    """As many threads as torch has, with one each for torch's own loops; torch has its number back afterwards."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield Workers(pool, threads)
    finally:
        torch.set_num_threads(threads)


def reload(target: Path, dtype: torch.dtype) -> Any:
    """The merged model from its files, on the CPU; raises ExportError when they do not hold exactly its weights."""
    model, loading = AutoModelForCausalLM.from_pretrained(
        target,
        dtype=dtype,
        output_loading_info=True,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
    )
    check_reload(loading, target)
    return model.eval()


def check_reload(loading_info: dict[str, Any], target: Path) -> None:
    """Raise ExportError when loading the merged model left a weight missing, unexpected or of another shape."""
    faults = {kind: sorted(map(str, names)) for kind, names in loading_info.items() if names}
    if faults:
        raise ExportError(f"the merged model does not load strictly: {faults}", target, "report this with params.yaml")


def texts_of_new_tokens(trained_ids: Sequence[int]) -> list[list[int]]:
    """Texts that hold every new token, for a comparison: a test row need not have it."""
    return [list(trained_ids[at : at + PROBE_TOKENS]) for at in range(0, len(trained_ids), PROBE_TOKENS)]


def check_difference(difference: float, bound: float) -> None:
    """Raise ExportError when merged logits are farther from those of base + adapter than `merge` allows."""
    if not difference <= bound:
        raise ExportError(
            f"merged logits differ from base + adapter by {difference:.4f}, more than {bound}",
            "merge.max_logit_difference",
            "set merge.dtype: float32, or raise the bound if the rounding of that dtype is acceptable",
        )


def summary_line(numbers: Mapping[str, Any], bound: float) -> str:
    """What was done, and how far each way of merging is from the model as it was trained."""
    line = (
        f"{numbers['changed_tensors']} of {numbers['tensors']} tensors changed, {numbers['size_bytes']:,} bytes, "
        f"largest logit difference {numbers['max_logit_difference']:.4f} (bound {bound})"
    )
    for way, figures in numbers.get("compare", {}).items():
        line += f"; {way}: KL {figures['mean_kl']:.5f}, same first choice {figures['top1_agreement']:.1%}"
    return line
