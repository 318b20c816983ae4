"""What all ways of train_throughput.py share: the model's shape, the packed rows, the clock and the arithmetic.

Needs torch alone, so that it also runs in the environments of the peers.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

GIB = 1 << 30
RANK = 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LLAMA_8B: dict[str, Any] = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TINY = {
    **LLAMA_8B,
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# Every row has as many tokens, and every optimizer step as many rows: 16k tokens, one micro-batch.
FULL: dict[str, Any] = {
    "shape": LLAMA_8B,
    "dtype": "bfloat16",
    "row_tokens": 8192,
    "document_tokens": 2048,
    "batch_rows": 2,
    "warmup_steps": 5,
    "steps": 20,
    "matmul_size": 8192,
}
MINIATURE: dict[str, Any] = {
    "shape": TINY,
    "dtype": "float32",
    "row_tokens": 128,
    "document_tokens": 32,
    "batch_rows": 2,
    "warmup_steps": 1,
    "steps": 3,
    "matmul_size": 256,
}


def document_lengths(scale: Mapping[str, Any]) -> list[list[int]]:
    """Tokens of each row's documents, as many as make the mean; drawn from 0.75 to 1.25 times it, but for the last."""
    draw = random.Random(0)  # noqa: S311
    mean, documents = scale["document_tokens"], scale["row_tokens"] // scale["document_tokens"]
    rows = []
    for _ in range(scale["steps"] * scale["batch_rows"]):
        lengths = [round(mean * draw.uniform(0.75, 1.25)) for _ in range(documents - 1)]
        rows.append([*lengths, scale["row_tokens"] - sum(lengths)])
    return rows


def packed_rows(scale: Mapping[str, Any]) -> list[dict[str, list[int]]]:
    """Rows of random ids, all of them trained: input_ids, labels and seq_lengths."""
    draw = random.Random(1)  # noqa: S311
    rows = []
    for lengths in document_lengths(scale):
        ids = [draw.randrange(3, scale["shape"]["vocab_size"]) for _ in range(sum(lengths))]
        rows.append({"input_ids": ids, "labels": list(ids), "seq_lengths": lengths})
    return rows


def flops_per_token(
    shape: Mapping[str, Any], lengths: Sequence[int], checkpointing: str, *, rank: int = RANK, trained: float = 1.0
) -> float:
    """Floating-point operations of forward and backward for one token, a frozen base and an adapter on all layers.

    Two a weight for the forward pass, two for the gradient of its input, two for a forward pass done again under
    checkpointing; the adapter has its own gradient besides. Causal attention takes 2 l d a layer and token in a
    document of l tokens (half of all pairs, for scores and for values), its backward 2.5 times that, and `selective`
    does not do it again. The output layer: forward, gradient and a forward again, at the `trained` share of tokens.
    """
    hidden, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    keys = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    matrices = [(hidden, hidden)] * 2 + [(hidden, keys)] * 2 + [(hidden, inner)] * 3
    base = layers * sum(rows * columns for rows, columns in matrices)
    adapter = layers * sum(rank * (rows + columns) for rows, columns in matrices)
    head = hidden * shape["vocab_size"]
    attention = 2 * hidden * layers * sum(length**2 for length in lengths) / sum(lengths)
    again: tuple[int, int] = {"none": (0, 0), "selective": (1, 0), "full": (1, 1)}[checkpointing]
    flops = 2 * base * (2 + again[0]) + 2 * adapter * (3 + again[0]) + attention * (3.5 + again[1]) + 6 * head * trained
    return float(flops)


def matmul_flops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Operations a second of a square matrix product on random data: the median of ten after three."""
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(13):
        clock = Clock(device, 0, 1)
        clock.mark()
        torch.matmul(one, other)
        clock.mark()
        seconds += clock.step_seconds()
    return 2.0 * size**3 / statistics.median(seconds[3:])


class Clock:
    """Times optimizer steps on the device, without waiting for it between them.

    As a hook behind each optimizer's `step` (torch.optim.optimizer.register_optimizer_step_post_hook) it works in any
    trainer. It waits for the device twice: before the first counted step and behind the last.
    """

    def __init__(self, device: torch.device, warmup: int, steps: int) -> None:
        self.device, self.warmup, self.steps = device, warmup, steps
        self.marks: list[Any] = []
        self.walls_s: list[float] = []

    def __call__(self, _optimizer: Any, _arguments: Any, _keywords: Any) -> None:
        """A step has been taken."""
        self.mark()
        if len(self.marks) in (self.warmup, self.steps):
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.walls_s.append(time.perf_counter())

    def mark(self) -> None:
        """Note the present point on the device's own clock."""
        if self.device.type != "cuda":
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self.marks.append(event)

    def step_seconds(self) -> list[float]:
        """Seconds between the marks behind the warm-up."""
        counted = self.marks[max(self.warmup - 1, 0) :]
        if self.device.type != "cuda":
            return [after - before for before, after in pairwise(counted)]
        torch.cuda.synchronize(self.device)
        return [before.elapsed_time(after) / 1000 for before, after in pairwise(counted)]

    def figures(self, tokens_per_step: float) -> dict[str, Any]:
        """Tokens a second by the median step and over all counted steps, and the spread of the steps.

        Raises RuntimeError when the trainer took other steps than it was asked for.
        """
        if len(self.marks) != self.steps:
            raise RuntimeError(f"{len(self.marks)} optimizer steps were taken, {self.steps} expected")
        steps, whole_s = self.step_seconds(), self.walls_s[1] - self.walls_s[0]
        return {
            "tokens_per_step": tokens_per_step,
            "tokens_per_s": round(tokens_per_step / statistics.median(steps), 1),
            "tokens_per_s_over_all_counted_steps": round(tokens_per_step * len(steps) / whole_s, 1),
            "step_ms": {
                "min": round(min(steps) * 1000, 1),
                "median": round(statistics.median(steps) * 1000, 1),
                "max": round(max(steps) * 1000, 1),
            },
            "counted_steps": len(steps),
        }


def memory_figures(device: torch.device) -> dict[str, float]:
    """Peaks of torch's allocator since the last reset, in GiB: of tensors, and of what it took from the card."""
    if device.type != "cuda":
        return {}
    return {
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated(device) / GIB, 2),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved(device) / GIB, 2),
    }
