"""The memory model beside a GPU's own count, on a random Llama-3.1-8B in NF4: `python benchmarks/train_memory.py`.

Rank 16 on all layers, in bfloat16 with torch's flash attention where the card has it: for each checkpointing, and for
micro-batches of 2k to 64k tokens in documents of 2048, two forward and backward passes through TRL's fused output
layer and an optimizer step. What the model says will not fit is listed and left out. Compared are the estimate without
the context and the peak of tensors (`max_memory_allocated`); beside them stands what torch took from the card
(`max_memory_reserved`), which the plan's margin has to cover. Writes train_memory.json with the machine beside it.

`--miniature` compares, on a CPU, what a live tiny Llama keeps for its backward with what the model says.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path
from typing import Any

from finetune.runtime import pin_cpu_code_path

pin_cpu_code_path()

import torch  # noqa: E402
from process_tree import machine  # noqa: E402
from throughput_case import driver, random_model, settings_of  # noqa: E402
from throughput_work import FULL, MINIATURE  # noqa: E402
from transformers import LlamaConfig  # noqa: E402
from trl.trainer.utils import add_fused_lm_head  # noqa: E402

from finetune.io import write_json  # noqa: E402
from finetune.training.activations import rehearse  # noqa: E402
from finetune.training.attention import choose_attention, selective_checkpointing  # noqa: E402
from finetune.training.batch_plan import usable_bytes  # noqa: E402
from finetune.training.device import GIB  # noqa: E402
from finetune.training.memory_model import MemoryModel, model_of  # noqa: E402
from finetune.training.method import make_trainable  # noqa: E402
from finetune.training.vocabulary import Extension  # noqa: E402

RESULT = Path(__file__).with_suffix(".json")
MODES = ("none", "selective", "full")
TOKENS = (2048, 4096, 8192, 16_384, 32_768, 65_536)
MINIATURE_TOKENS = 257
DOCUMENT_TOKENS = 2048
TOLERANCE = 0.1
KEPT = Extension((), 0)


def settings_for(scale: dict[str, Any], checkpointing: str) -> Any:
    """The settings of a case, without fused layer kernels: the model counts plain layers."""
    case = {"checkpointing": checkpointing, "attention": "auto", "liger": False, "double_quantization": False}
    return settings_of(case, scale)


def miniature() -> list[dict[str, Any]]:
    """What a live model keeps for its backward on a CPU, beside what the memory model says."""
    config, found = LlamaConfig(**MINIATURE["shape"]), []
    for mode in MODES:
        settings = settings_for(MINIATURE, mode)
        live = make_trainable(random_model(MINIATURE, "sdpa", double_quantization=False), settings, KEPT)
        held = rehearse(live, settings, MINIATURE_TOKENS, mode)
        says = model_of(config, settings, KEPT, "sdpa").estimate(MINIATURE_TOKENS, mode)
        found.append(
            {
                "checkpointing": mode,
                "predicted_bytes": says.activations + says.attention_mask,
                "live_bytes": held.kept_bytes(MINIATURE_TOKENS) + held.mask_bytes(MINIATURE_TOKENS),
            }
        )
    return found


def measure_mode(mode: str) -> list[dict[str, Any]]:
    """Every number of tokens under one checkpointing, on the GPU."""
    # The model of the mode before refers to itself.
    gc.collect()
    device, config = torch.device("cuda:0"), LlamaConfig(**FULL["shape"])
    settings = settings_for(FULL, mode)
    attention = choose_attention("auto", config, device, torch.bfloat16)
    says = model_of(config, settings, KEPT, attention)
    base = random_model(FULL, attention, double_quantization=False)
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    model = make_trainable(base, settings, KEPT).train()
    if mode != "none":
        model.enable_input_require_grads()
    if mode == "full":
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    elif mode == "selective":
        selective_checkpointing(base)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    card_bytes = usable_bytes(settings, torch.cuda.get_device_properties(device).total_memory)
    return [{"checkpointing": mode, **measure(model, optimizer, says, mode, each, card_bytes)} for each in TOKENS]


def measure(
    model: Any, optimizer: torch.optim.Optimizer, says: MemoryModel, mode: str, tokens: int, usable: int
) -> dict[str, Any]:
    """Predicted and measured bytes of one micro-batch."""
    estimate = says.estimate(tokens, mode)
    predicted = estimate.total - estimate.context
    figures: dict[str, Any] = {"tokens": tokens, "predicted_bytes": predicted}
    if estimate.total > usable:
        return {**figures, "measured": "no: does not fit"}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        loss_of(model, tokens).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    allocated = torch.cuda.max_memory_allocated()
    return {
        **figures,
        "allocated_bytes": allocated,
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "predicted_over_allocated": round(predicted / allocated, 4),
    }


def loss_of(model: Any, tokens: int) -> torch.Tensor:
    """The loss of random ids, all of them trained, as the trainer's collator lays them out."""
    ids = torch.randint(3, FULL["shape"]["vocab_size"], (1, tokens), device="cuda")
    ends = torch.arange(0, tokens + 1, DOCUMENT_TOKENS, dtype=torch.int32, device="cuda")
    inputs = {
        "input_ids": ids,
        "labels": ids,
        "position_ids": (torch.arange(tokens, device="cuda") % DOCUMENT_TOKENS)[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": DOCUMENT_TOKENS,
        "max_length_k": DOCUMENT_TOKENS,
    }
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss: torch.Tensor = model(**inputs, use_cache=False, fused_lm_head=True).loss
    return loss


def main() -> int:
    """Measure and record; returns 1 when a figure is off by more than the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--miniature", action="store_true")
    if parser.parse_args().miniature:
        found = miniature()
        for figures in found:
            sys.stdout.write(f"{figures}\n")
        return int(any(figures["predicted_bytes"] != figures["live_bytes"] for figures in found))
    if not torch.cuda.is_available():
        parser.error("no CUDA device; --miniature compares what a CPU can")
    cases = []
    for mode in MODES:
        cases += measure_mode(mode)
        sys.stdout.write("".join(f"{case}\n" for case in cases if case["checkpointing"] == mode))
    off = [case for case in cases if abs(case.get("predicted_over_allocated", 1.0) - 1) > TOLERANCE]
    properties = torch.cuda.get_device_properties(0)
    device = {"name": properties.name, "memory_gib": round(properties.total_memory / GIB, 1), "driver": driver()}
    write_json(RESULT, {**machine(), "device": device, "cases": cases, "off_by_more_than_10_percent": len(off)})
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
