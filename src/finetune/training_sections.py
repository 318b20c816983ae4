"""The section `train_qlora` of params.yaml: frozen and strict, each value written out with its bounds.

Everything here can change the adapter's bytes, or whether the run fits the machine. Imports no torch.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from finetune.sections import Positive, Section, Share


class Quantization(Section):
    """How the frozen base is held: bitsandbytes NF4 or FP4 in blocks, or 16/32 bit with `format: none`."""

    format: Literal["nf4", "fp4", "none"]
    double_quantization: bool


class Lora(Section):
    """The adapter; `target_modules` are names of linear layers.

    `modules_to_save`: names of modules trained and saved whole beside it, such as `embed_tokens` or `lm_head`.
    """

    rank: Positive
    alpha: Positive
    dropout: Annotated[float, Field(ge=0, lt=1)]
    use_dora: bool
    use_rslora: bool
    target_modules: Annotated[list[str], Field(min_length=1)]
    modules_to_save: list[str]


class EarlyStopping(Section):
    """Stop after `patience` validations in a row whose loss is not `min_improvement` nats below the best one.

    What is delivered is the state with the lowest validation loss, not the last one.
    """

    patience: Positive
    min_improvement: Annotated[float, Field(ge=0)]


class CudaMemory(Section):
    """torch's allocator: the share of the card it may take, segments that grow, and the largest block that is split.

    On a CPU nothing of it applies.
    """

    fraction: Annotated[float, Field(gt=0, le=1)]
    expandable_segments: bool
    max_split_size_mib: Annotated[int, Field(ge=21)] | None


class Distribution(Section):
    """How many processes train together: each holds the model (`ddp`), or a shard of it (`fsdp2`)."""

    strategy: Literal["single", "ddp", "fsdp2"]
    processes: Positive

    @model_validator(mode="after")
    def _strategy_fits_processes(self) -> Self:
        if (self.strategy == "single") != (self.processes == 1):
            raise ValueError(
                f"strategy {self.strategy} with processes {self.processes}: single has 1 process, ddp and fsdp2 more"
            )
        return self


class TrainQlora(Section):
    """The optimisation. Steps are optimizer steps; `warmup_share` is a share of all steps.

    `method`: `lora` trains an adapter, `full` every weight of the base. `batch_rows`: packed rows of one optimizer
    step, over all processes. `micro_batch_rows`: rows of one forward and backward, `auto` for what the card's memory
    holds; it changes no result beyond rounding. `neftune_alpha`: noise on the embeddings, null for none.
    `gradient_checkpointing`: what is computed again in the backward pass: nothing, all but attention (`selective`), or
    every layer (`full`); `auto` for the fastest that fits. `attention`: `varlen` is torch's flash attention over
    documents of any length, for CUDA and 16 bit; `sdpa` runs everywhere; `auto` chooses. `liger_kernels`: fused
    norms, rotations and activations on CUDA. `deterministic`: refuse kernels whose result depends on timing.
    `max_skipped_steps`: steps in a row that may be skipped because their gradient is not finite.
    """

    method: Literal["lora", "full"]
    quantization: Quantization
    compute_dtype: Literal["float32", "bfloat16", "float16"]
    lora: Lora | None
    epochs: Positive
    batch_rows: Positive
    micro_batch_rows: Positive | Literal["auto"]
    learning_rate: Annotated[float, Field(gt=0, le=1)]
    scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup", "inverse_sqrt"]
    warmup_share: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: Share
    max_gradient_norm: Annotated[float, Field(gt=0)]
    optimizer: Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]
    neftune_alpha: Annotated[float, Field(gt=0)] | None
    gradient_checkpointing: Literal["none", "selective", "full", "auto"]
    attention: Literal["auto", "sdpa", "varlen"]
    liger_kernels: bool
    deterministic: bool
    early_stopping: EarlyStopping | None
    max_skipped_steps: Annotated[int, Field(ge=0)]
    cuda_memory: CudaMemory
    distribution: Distribution
    log_every_steps: Positive
    evaluate_every_steps: Positive
    save_every_steps: Positive
    keep_checkpoints: Positive

    @model_validator(mode="after")
    def _method_fits(self) -> Self:
        if (self.method == "lora") != (self.lora is not None):
            raise ValueError(f"method {self.method}: lora must be given for lora, and null for full")
        if self.method == "full" and self.quantization.format != "none":
            raise ValueError(
                f"method full trains 16 or 32-bit weights: quantization.format is {self.quantization.format}"
            )
        return self

    @model_validator(mode="after")
    def _rows_divide(self) -> Self:
        processes = self.distribution.processes
        micro = 1 if self.micro_batch_rows == "auto" else self.micro_batch_rows
        if self.batch_rows % (micro * processes):
            raise ValueError(
                f"batch_rows ({self.batch_rows}) must be a multiple of micro_batch_rows ({micro}) times "
                f"distribution.processes ({processes})"
            )
        return self
