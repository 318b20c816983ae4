"""base, settings, rows and the machine -> what the run will be, decided before a weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoConfig

from finetune.io import sha256_file, sha256_text
from finetune.log import logger
from finetune.training.attention import choose_attention
from finetune.training.batch_plan import choose
from finetune.training.batches import RowSizes
from finetune.training.checkpoint import run_key
from finetune.training.device import (
    GIB,
    allow_any_kernel,
    check_hardware,
    choose_device,
    dtype_named,
    limit_cuda_memory,
)
from finetune.training.distribution import check_strategy
from finetune.training.layer_kernels import liger_arguments
from finetune.training.model import locate_base, verify_base
from finetune.training.vocabulary import Extension
from finetune.training_sections import TrainQlora

LIGER = ("liger-kernel",)
LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")
# Neither changes a byte of a result, and a user may change them to get on where a disk was full.
CHANGEABLE = {"save_every_steps", "keep_checkpoints"}


@dataclass(frozen=True)
class Prepared:
    """The settings with every `auto` decided, and where and how the forward pass runs."""

    settings: TrainQlora
    attention: str
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """What the forward pass computes in."""
        return dtype_named(self.settings.compute_dtype)

    @property
    def loading_device(self) -> torch.device:
        """Where the base is read to: shards go from the host's memory to their cards, layer by layer."""
        return torch.device("cpu") if self.settings.distribution.strategy == "fsdp2" else self.device

    @property
    def device_name(self) -> str:
        """The kind of device: bytes are equal on one kind only."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"


def prepare(base: Path, extension: Extension, settings: TrainQlora, sizes: RowSizes) -> Prepared:
    """Choose device, attention, micro-batch and checkpointing; raises DeviceError where nothing fits or runs."""
    device = choose_device()
    limit_cuda_memory(settings.cuda_memory, device)
    if not settings.deterministic:
        allow_any_kernel()
    check_hardware(settings, device)
    # The Hub cache is outside of DVC's sight; a bit flipped in it since the base stage would train in silence.
    verify_base(base)
    check_strategy(settings)
    config = AutoConfig.from_pretrained(locate_base(base), trust_remote_code=False, local_files_only=True)
    liger_arguments(settings, config.model_type, device)
    attention = choose_attention(settings.attention, config, device, dtype_named(settings.compute_dtype))
    card_bytes = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    plan = choose(
        base,
        settings,
        extension,
        pack_tokens=int(sizes.tokens.max()),
        longest_document_tokens=int(sizes.longest.max()),
        attention=attention,
        card_bytes=card_bytes,
    )
    expected = f", {plan.estimate.total / GIB:.1f} GiB expected" if plan.estimate is not None else ""
    logger.info(
        "%d row(s) a micro-batch, %d a step; gradient checkpointing: %s%s",
        plan.micro_batch_rows,
        settings.batch_rows,
        plan.gradient_checkpointing,
        expected,
    )
    decided = {
        "micro_batch_rows": plan.micro_batch_rows,
        "gradient_checkpointing": plan.gradient_checkpointing,
    }
    return Prepared(settings.model_copy(update=decided), attention, device)


def key_of(prepared: Prepared, inputs: Mapping[str, str], seed: int, cpu_threads: int) -> str:
    """The name of the run's folder: a hash of everything that determines its bytes."""
    return run_key(
        {
            "inputs": dict(inputs),
            "params": [prepared.settings.model_dump(exclude=CHANGEABLE), seed, cpu_threads],
            "machine": [prepared.device_name, prepared.attention],
            "libraries": {name: version(name) for name in LIBRARIES + LIGER * prepared.settings.liger_kernels},
            "code": code_hash(),
        }
    )


def code_hash() -> str:
    """Hash of this package's source: other code never resumes a run."""
    return sha256_text("".join(sha256_file(file) for file in sorted(Path(__file__).parent.glob("*.py"))))
