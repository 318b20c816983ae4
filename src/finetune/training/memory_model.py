"""models/base + train_qlora + vocabulary -> the bytes that training takes on one card, term by term, before it starts.

What lies still (weights, scales, adapter, gradients, optimizer) is counted on the architecture without storage, to the
byte; what a forward and backward holds comes from a rehearsal (activations.py); no weights are read. It is a bound from
above with fused layer kernels (`liger_kernels`), which keep less than the plain layers that are rehearsed, and with
FSDP2, which spreads over cards what is counted whole here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from finetune.training.activations import Rehearsal, StandInLinear, rehearse_shapes, stand_in
from finetune.training.device import GIB, dtype_named
from finetune.training.model import locate_base
from finetune.training.vocabulary import Extension
from finetune.training_sections import TrainQlora

# bitsandbytes 0.50.2, functional.py: 64 values share a float32 scale; double quantisation holds the scales in 8 bit,
# 256 of them with a float32 scale of their own, and an offset. Each layer has its tables of 16 and 256 values.
VALUES_PER_SCALE, SCALES_PER_SCALE = 64, 256
TABLE_BYTES, NESTED_TABLE_BYTES, OFFSET_BYTES = 16 * 4, 256 * 4, 4
# optim/optimizer.py: smaller tensors keep 32-bit states, and smaller ones are never paged.
MIN_8BIT_VALUES, VALUES_PER_STATE_SCALE, MIN_PAGED_VALUES = 4096, 256, 100_000
# trl 1.16, kernels/chunked_logprob.py and trainer/utils.py: the tile of logits, in tokens and in words.
TILE_TOKENS, TILE_WORDS = 4096, 32768
# Eleven float32 values per token beside its hidden state: running sums, results and their gradients (same file).
HEAD_VALUES_PER_TOKEN = 11
# What the driver, the loaded kernels and cuBLAS hold before the first tensor: about 0.5 GiB on an H100 by nvidia-smi,
# and 32 MiB of CUBLAS_WORKSPACE_CONFIG=:4096:8. Not measured here.
CONTEXT_BYTES = 640 << 20


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one card by what holds them, at the fullest moment of an optimizer step.

    `adapter`: what is trained, and so every weight with method full. `optimizer`: without states that are paged.
    `activations`: kept for the backward; `attention_mask`: kept in tensors of tokens x tokens. `head`: what the output
    layer and the loss hold. `workspace`: what one layer's backward takes beyond the head, which is over by then.
    """

    four_bit_weights: int
    quantization_scales: int
    other_weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    attention_mask: int
    workspace: int
    context: int

    @property
    def total(self) -> int:
        """The sum of all terms."""
        terms: list[int] = [getattr(self, term.name) for term in fields(self)]
        return sum(terms)

    def table(self) -> list[tuple[str, float]]:
        """Each term and the total as (name, GiB), for people to read."""
        names = [*(term.name for term in fields(self)), "total"]
        return [(name.replace("_", " "), getattr(self, name) / GIB) for name in names]


@dataclass(frozen=True)
class StillBytes:
    """Bytes of one process that no batch changes; `layer` is the largest 4-bit layer in 16 or 32 bit."""

    four_bit_weights: int
    quantization_scales: int
    other_weights: int
    adapter: int
    gradients: int
    optimizer: int
    layer: int


@dataclass(frozen=True)
class MemoryModel:
    """Sizes of one architecture with its settings; rehearsals are made as they are asked for, about a second each.

    `output_trained`: how many values of the output layer are trained: none, those of single rows, or all.
    """

    config: PreTrainedConfig
    settings: TrainQlora
    extension: Extension
    attention: str
    still: StillBytes
    output_trained: int
    rehearsals: dict[str, Rehearsal] = field(default_factory=dict)

    def estimate(self, tokens: int, checkpointing: str) -> MemoryEstimate:
        """What a forward and backward over `tokens` tokens takes; `checkpointing`: none, selective or full."""
        if checkpointing not in self.rehearsals:
            self.rehearsals[checkpointing] = rehearse_shapes(
                self.config, self.settings, self.extension, self.attention, checkpointing
            )
        held, still, head = self.rehearsals[checkpointing], self.still, self._head_bytes(tokens)
        # Beside the gradients DDP holds the buckets that it sends.
        copies = 2 if self.settings.distribution.strategy == "ddp" else 1
        return MemoryEstimate(
            four_bit_weights=still.four_bit_weights,
            quantization_scales=still.quantization_scales,
            other_weights=still.other_weights,
            adapter=still.adapter,
            gradients=still.gradients * copies,
            optimizer=still.optimizer,
            activations=held.kept_bytes(tokens),
            head=head,
            attention_mask=held.mask_bytes(tokens),
            workspace=max(0, held.work_bytes(tokens) + still.layer - head),
            context=CONTEXT_BYTES,
        )

    def _head_bytes(self, tokens: int) -> int:
        """TRL's fused output layer at the end of its backward, where every token is trained."""
        text, word = self.config.get_text_config(), dtype_named(self.settings.compute_dtype).itemsize
        # The hidden states of trained tokens, their gradient in float32 and that again in 16 bit.
        states: int = tokens * text.hidden_size * (2 * word + 4)
        tile = min(tokens, TILE_TOKENS) * TILE_WORDS * word
        table = max(text.vocab_size, self.extension.rows) * text.hidden_size
        weight = 0
        if self.output_trained >= table:
            # The gradient of a float32 table, and a tile of that table in 16 bit.
            weight = table * 4 + TILE_WORDS * text.hidden_size * word
        elif self.output_trained:
            # Trained rows make a copy of the table, whose gradient comes in float32 and again in 16 bit.
            weight = table * (2 * word + 4)
        return states + tile + weight + tokens * HEAD_VALUES_PER_TOKEN * 4


def open_model(base: Path, settings: TrainQlora, extension: Extension, attention: str) -> MemoryModel:
    """The sizes of models/base as `settings` would train it; `attention` is what attention.choose_attention returns.

    Raises DataError when the base is not in the Hub cache, or for targets that it does not have.
    """
    config = AutoConfig.from_pretrained(locate_base(base), trust_remote_code=False, local_files_only=True)
    return model_of(config, settings, extension, attention)


def model_of(config: PreTrainedConfig, settings: TrainQlora, extension: Extension, attention: str) -> MemoryModel:
    """`open_model` for a configuration at hand."""
    with torch.device("meta"):
        model = stand_in(config, settings, extension, attention)
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    output = sum(tensor.numel() for tensor in causal.get_output_embeddings().parameters() if tensor.requires_grad)
    return MemoryModel(config, settings, extension, attention, count_still(model, settings), output)


def estimate(
    base: Path,
    settings: TrainQlora,
    extension: Extension,
    *,
    micro_batch_tokens: int,
    longest_document_tokens: int,
    checkpointing: str,
    attention: str,
) -> MemoryEstimate:
    """What one forward and backward takes on a card; a micro-batch holds its longest document whole.

    `checkpointing`: none, selective or full. `attention`: what attention.choose_attention returns.
    """
    model = open_model(base, settings, extension, attention)
    return model.estimate(max(micro_batch_tokens, longest_document_tokens), checkpointing)


def count_still(model: Any, settings: TrainQlora) -> StillBytes:
    """Count a model that stand_in made: its 4-bit layers as bitsandbytes packs them, all else as it is."""
    layers = [module for module in model.modules() if isinstance(module, StandInLinear)]
    packed = {id(layer.weight) for layer in layers}
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in packed}
    trained = [tensor for tensor in tensors.values() if tensor.requires_grad]
    trained_bytes = sum(map(_size_bytes, trained))
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    sizes = [(tensor.numel(), id(tensor) in tables) for tensor in trained]
    values = [layer.weight.numel() for layer in layers]
    double = settings.quantization.double_quantization
    return StillBytes(
        four_bit_weights=sum(-(-count // 2) for count in values),
        quantization_scales=sum(scale_bytes(count, double) for count in values),
        other_weights=sum(map(_size_bytes, tensors.values())) - trained_bytes,
        adapter=trained_bytes,
        gradients=trained_bytes,
        optimizer=optimizer_bytes(sizes, settings.optimizer),
        layer=max(values, default=0) * dtype_named(settings.compute_dtype).itemsize,
    )


def _size_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def scale_bytes(values: int, double_quantization: bool) -> int:
    """What bitsandbytes holds beside a 4-bit layer of `values` weights."""
    scales = -(-values // VALUES_PER_SCALE)
    if not double_quantization:
        return scales * 4 + TABLE_BYTES
    nested = -(-scales // SCALES_PER_SCALE)
    return scales + nested * 4 + TABLE_BYTES + NESTED_TABLE_BYTES + OFFSET_BYTES


def optimizer_bytes(sizes: Iterable[tuple[int, bool]], optimizer: str) -> int:
    """Two states of each trained tensor, on the card; those that are paged leave it when memory is short.

    `sizes`: values of a tensor, and whether it is an embedding: transformers 5.23 keeps its states in 32 bit.
    """
    total, has_tables = 0, False
    for values, is_embedding in sizes:
        in_8bit = optimizer.endswith("8bit") and values >= MIN_8BIT_VALUES and not is_embedding
        has_tables |= in_8bit
        if not (optimizer.startswith("paged") and values >= MIN_PAGED_VALUES):
            total += 2 * values * (1 if in_8bit else 4)
        if in_8bit:
            total += 2 * -(-values // VALUES_PER_STATE_SCALE) * 4
        if optimizer.startswith("adamw_torch"):
            # The number of steps taken, one float32 per tensor.
            total += 4
    return total + (2 * NESTED_TABLE_BYTES if has_tables else 0)
