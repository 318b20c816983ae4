"""The sections of params.yaml from `base` to `register`: frozen and strict, each value written out with its bounds.

No section has a default: what a run does is what params.yaml says. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
RepoId = Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
BlockMultiple = Annotated[int, Field(ge=256, multiple_of=256)]
QuantizationType = Literal["F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M"]


def repeated(names: Sequence[str]) -> list[str]:
    """The names that stand more than once, sorted."""
    return sorted({name for name in names if names.count(name) > 1})


def _is_commit(revision: str) -> str:
    if re.fullmatch(r"[0-9a-f]{40}", revision) is None:
        raise ValueError(
            "a commit has 40 hex digits; `make pin NAME=<recipe>` (or `make pin` for params.yaml) writes the one that "
            f"a branch or tag stands for; got {revision!r}"
        )
    return revision


Revision = Annotated[str, AfterValidator(_is_commit)]


class Section(BaseModel):
    """Base of all sections: unknown keys, other types, infinity, NaN and later changes are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ScratchModel(Section):
    """Shape of the scratch Llama (widths in multiples of 256, so that K-quants are real) and its pre-training."""

    hidden_size: BlockMultiple
    intermediate_size: BlockMultiple
    layers: Positive
    attention_heads: Positive
    key_value_heads: Positive
    max_position_tokens: Positive
    tie_embeddings: bool
    pretrain_steps: Positive
    batch_rows: Positive
    row_tokens: Positive
    learning_rate: Annotated[float, Field(gt=0, le=1)]

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.attention_heads or self.attention_heads % self.key_value_heads:
            raise ValueError(
                f"attention_heads ({self.attention_heads}) must divide hidden_size ({self.hidden_size}), "
                f"and key_value_heads ({self.key_value_heads}) must divide attention_heads"
            )
        return self


class Base(Section):
    """The model to adapt: `scratch` is read when `fetch.base_model.kind` is scratch, and null otherwise."""

    scratch: ScratchModel | None


class ToolCallSet(Section):
    """Questions with functions to call, in the form of the Berkeley leaderboard; paths relative to the folder.

    `answers`: file of accepted calls, or null where no function fits and the model must call none.
    """

    name: Name
    questions: Annotated[str, Field(min_length=1)]
    answers: str | None


class ToolCalls(Section):
    """Sets of tool-call questions below `folder`; an empty list asks none."""

    folder: Annotated[str, Field(min_length=1)]
    sets: list[ToolCallSet]

    @model_validator(mode="after")
    def _unique_names(self) -> Self:
        names = [entry.name for entry in self.sets]
        if doubles := repeated(names):
            raise ValueError(f"names of sets must differ, repeated: {', '.join(doubles)}")
        return self


class Evaluate(Section):
    """`samples_per_source` test prompts are answered by base and tuned, greedily, `max_new_tokens` at most.

    `answers_per_task`: at most so many questions of each tool-call set, style source and labelled source.
    `bootstrap_resamples`: draws for each 95 % interval. `memorization_tokens`: an answer that repeats so many
    consecutive tokens of a training row is a copy. `style_sources`: sources whose answers are compared with held-out
    ones by length, punctuation and vocabulary. `labels`: source -> the answers that it may have, for accuracy and F1.
    """

    samples_per_source: Positive
    answers_per_task: Positive
    max_new_tokens: Positive
    bootstrap_resamples: Annotated[int, Field(ge=100)]
    memorization_tokens: Positive
    tool_calls: ToolCalls
    style_sources: list[Name]
    labels: dict[Name, Annotated[list[str], Field(min_length=2)]]


class Merge(Section):
    """`onto`: the original 16-bit weights, or the 4-bit ones of training, dequantised.

    `max_logit_difference`: largest absolute difference allowed between merged and base + adapter logits. Both are
    computed in `compare_dtype` on the CPU, one after the other: 4 bytes a parameter for float32, else 2.
    `compare_rows`: test rows on which both ways are measured against the trained model.
    """

    onto: Literal["original", "dequantized"]
    dtype: Literal["bfloat16", "float16", "float32"]
    compare_dtype: Literal["bfloat16", "float32"]
    max_logit_difference: Annotated[float, Field(gt=0)]
    compare_rows: Positive


class QuantizedType(Section):
    """One GGUF file to make, and its budget against the merged model on the test rows.

    The most that its perplexity may be, as a ratio; the most that its mean KL divergence may be, in nats a token; the
    least share of tokens whose most likely next token is the same.
    """

    type: QuantizationType
    max_perplexity_ratio: Annotated[float, Field(ge=1)]
    max_mean_kl: Annotated[float, Field(ge=0)]
    min_top1_agreement: Share


class QuantizeGguf(Section):
    """The GGUF files to make. `importance_matrix_rows`: training rows for an importance matrix, null for none."""

    importance_matrix_rows: Positive | None
    types: Annotated[list[QuantizedType], Field(min_length=1)]

    @model_validator(mode="after")
    def _unique_types(self) -> Self:
        if doubles := repeated([entry.type for entry in self.types]):
            raise ValueError(f"types must differ, repeated: {', '.join(doubles)}")
        return self


class OllamaModelfile(Section):
    """What `ollama create` reads. `num_ctx` in tokens; `stop`: further stop strings beside the end-of-turn token.

    `renderer`: which template Ollama builds prompts with: `go`, the TEMPLATE derived here, or `jinja`, the one inside
    the GGUF (Ollama 0.30 and later), for chat templates that Go cannot express.
    """

    quantization: QuantizationType
    renderer: Literal["go", "jinja"]
    system: str
    num_ctx: Positive
    temperature: Annotated[float, Field(ge=0)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    repeat_penalty: Annotated[float, Field(gt=0)]
    stop: list[str]


class Register(Section):
    """`mode`: `upload` copies the merged model and the GGUF into the registry; `reference` registers hashes only.

    `serving` registers a small server that finds the GGUF by its hash, for `mlflow models serve`.

    The names go into MLflow's search filters, and `model_name` into `ollama create`: no quotes, and no capitals there.
    """

    experiment: Annotated[str, Field(pattern=r"^[A-Za-z0-9/][A-Za-z0-9 ._/@-]*$")]
    model_name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=80)]
    mode: Literal["upload", "serving", "reference"]
