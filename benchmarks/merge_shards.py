"""Merging a model of 1.1 billion parameters, beside a plain copy and beside PEFT: `python benchmarks/merge_shards.py`.

A random Llama in bfloat16 (the shape of TinyLlama-1.1B, 5 shards) and a rank-16 adapter on all linear layers are made
in BENCHMARK_FOLDER, or where temporary files go: 5 GB are needed there, and 8 GB of memory. Each way runs in a process
of its own, the ways by turns, each fsynced, its source in the page cache; `wall_s` is its work without the start of
Python and the imports, which `imports_s` says. Peak memory is that of the whole process as the kernel recorded it
(getrusage): files are read without mmap, so that it holds no page cache, but for PEFT's. Writes merge_shards.json.
"""

from __future__ import annotations

from finetune.runtime import pin_cpu_code_path

# As the stages do, before numpy is imported.
pin_cpu_code_path()

import os  # noqa: E402
import resource  # noqa: E402
import shutil  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from process_tree import machine  # noqa: E402

from finetune.io import read_json, sha256_tree, write_json  # noqa: E402

ROUNDS, PEFT_ROUNDS = 7, 2
THREADS = 2
RANK = 16
CHUNK_BYTES = 1 << 19
SHARD_SIZE = "500MB"
SHAPE = {
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
MAX_PEAK_GB, MAX_RATIO = 1.0, 1.5


def make(folder: Path) -> None:
    """The checkpoint and an adapter that is not zero, as PEFT saves it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model.save_pretrained(folder / "base", max_shard_size=SHARD_SIZE)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=RANK, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter, dtype=torch.float32) * 0.02
    adapted.save_pretrained(folder / "adapter")


def ours(folder: Path) -> Callable[[], object]:
    """This project's merge."""
    import torch

    from finetune.export.layout import read_layout
    from finetune.export.merge import merge_shards

    torch.set_num_threads(THREADS)
    # transformers imports an architecture's code when it is first asked for.
    read_layout(folder / "base")
    return lambda: merge_shards(folder / "base", folder / "adapter", folder / "merged", "bfloat16", [])


def copy(folder: Path) -> Callable[[], object]:
    """A plain copy of the weight files, in chunks of the size of a merged block."""

    def work() -> None:
        (folder / "merged").mkdir()
        for file in sorted((folder / "base").glob("*.safetensors")):
            with file.open("rb", buffering=0) as source, (folder / "merged" / file.name).open("wb", buffering=0) as to:
                while chunk := source.read(CHUNK_BYTES):
                    to.write(chunk)
                os.fsync(to.fileno())

    return work


def peft(folder: Path) -> Callable[[], object]:
    """PEFT's merge_and_unload and transformers' save_pretrained."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from finetune.export.layout import read_layout

    torch.set_num_threads(THREADS)
    read_layout(folder / "base")

    def work() -> None:
        base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
        model = PeftModel.from_pretrained(base, str(folder / "adapter")).merge_and_unload()
        model.save_pretrained(folder / "merged", max_shard_size=SHARD_SIZE)
        for file in (folder / "merged").glob("*.safetensors"):
            with file.open("rb") as handle:
                os.fsync(handle.fileno())

    return work


WAYS = {"ours": ours, "copy": copy, "peft": peft}


def child(name: str, folder: Path) -> None:
    """One way, once; leaves its wall time and its peak memory in a file."""
    started = time.monotonic()
    work = WAYS[name](folder)
    ready, ready_cpu = time.monotonic(), time.process_time()
    work()
    cost = {
        "imports_s": ready - started,
        "wall_s": time.monotonic() - ready,
        "cpu_s": time.process_time() - ready_cpu,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }
    write_json(folder / "cost.json", cost)


def measure(name: str, folder: Path) -> dict[str, float]:
    """Run one way in a process of its own, from an empty target."""
    shutil.rmtree(folder / "merged", ignore_errors=True)
    subprocess.run([sys.executable, __file__, name, str(folder)], check=True)
    cost: dict[str, float] = read_json(folder / "cost.json")
    return cost


def summary(costs: list[dict[str, float]]) -> dict[str, Any]:
    """The least and the median wall time, and the largest memory, of several runs."""
    walls = [cost["wall_s"] for cost in costs]
    return {
        "wall_s": {"min": round(min(walls), 2), "median": round(statistics.median(walls), 2)},
        "cpu_s": round(statistics.median(cost["cpu_s"] for cost in costs), 2),
        "imports_s": round(statistics.median(cost["imports_s"] for cost in costs), 2),
        "peak_gb": round(max(cost["peak_gb"] for cost in costs), 3),
        "runs": len(costs),
    }


def product_costs() -> dict[str, float]:
    """Seconds for 10^9 values of B A on one thread, in both libraries as the stages have them, in blocks as merged."""
    import numpy as np
    import torch

    torch.set_num_threads(1)
    a, b = torch.randn(RANK, 2048), torch.randn(128, RANK)
    products: dict[str, Callable[[], object]] = {
        "torch": lambda: b @ a,
        "numpy": lambda: np.matmul(b.numpy(), a.numpy()),
    }
    costs = {}
    for name, product in products.items():
        walls = []
        for _ in range(200):
            started = time.perf_counter()
            product()
            walls.append(time.perf_counter() - started)
        costs[name] = round(statistics.median(walls) / (len(b) * a.shape[1]) * 1e9, 3)
    return costs


def main() -> int:
    """Make the model, run the ways by turns, and write what they took."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCHMARK_FOLDER")) as name:
        folder = Path(name)
        subprocess.run([sys.executable, __file__, "make", name], check=True)
        files = list((folder / "base").glob("*.safetensors"))
        costs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        hashes = set()
        # The first round of each fills the page cache, and is not counted.
        for number in range(ROUNDS + 1):
            for way in WAYS if number < PEFT_ROUNDS + 1 else ("ours", "copy"):
                cost = measure(way, folder)
                hashes |= {sha256_tree(folder / "merged")} if way == "ours" else set()
                costs[way] += [cost] if number else []
        size_bytes = sum(file.stat().st_size for file in files)
    ratios = [one["wall_s"] / other["wall_s"] for one, other in zip(costs["ours"], costs["copy"], strict=True)]
    ways = {way: summary(each) for way, each in costs.items()}
    ratio = statistics.median(ratios)
    result = {
        **machine(),
        "threads": THREADS,
        "size_gb": round(size_bytes / 1e9, 3),
        "shards": len(files),
        "rank": RANK,
        "ways": ways,
        "ours_over_copy": {"min": round(min(ratios), 3), "median": round(ratio, 3), "max": round(max(ratios), 3)},
        "bytes_equal_on_repeat": len(hashes) == 1,
        "seconds_for_a_billion_values_of_b_a_on_one_thread": product_costs(),
        "bars": {"max_peak_gb": MAX_PEAK_GB, "max_ours_over_copy": MAX_RATIO},
        "passed": len(hashes) == 1 and ways["ours"]["peak_gb"] <= MAX_PEAK_GB and ratio <= MAX_RATIO,
    }
    write_json(Path(__file__).with_suffix(".json"), result)
    sys.stdout.write(f"{result}\n")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(main())
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        child(sys.argv[1], Path(sys.argv[2]))
