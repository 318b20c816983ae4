"""params.yaml -> one checked Params: every fault reported together, by key, before any work.

Values are read as YAML 1.2, as DVC reads them (YAML 1.1 makes `2e-06` a string). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from finetune.data_sections import Clean, ExtendTokenizer, Fetch, KeepTokenizer, Split, Tokenize, TrainTokenizer
from finetune.errors import ParamsError
from finetune.sections import (
    Base,
    Evaluate,
    Merge,
    Name,
    OllamaModelfile,
    Positive,
    QuantizeGguf,
    Register,
    ScratchModel,
    Section,
)
from finetune.training_sections import TrainQlora


class Params(Section):
    """The whole of params.yaml. `recipe` is a label; `cpu_threads` fixes the order of sums on a CPU."""

    recipe: Name
    seed: Annotated[int, Field(ge=0, lt=2**31)]
    cpu_threads: Positive
    fetch: Fetch
    clean: Clean
    tokenizer: Annotated[KeepTokenizer | ExtendTokenizer | TrainTokenizer, Field(discriminator="strategy")]
    base: Base
    tokenize: Tokenize
    split: Split
    train_qlora: TrainQlora
    evaluate: Evaluate
    merge: Merge
    quantize_gguf: QuantizeGguf
    ollama_modelfile: OllamaModelfile
    registration: Annotated[Register, Field(alias="register")]

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if faults := list(self._disagreements()):
            raise ValueError("; ".join(faults))
        return self

    def _disagreements(self) -> Iterator[str]:
        hub = self.fetch.base_model.kind == "hub"
        if hub == (self.base.scratch is not None):
            yield (
                "base.scratch must be given exactly when fetch.base_model.kind is scratch, "
                f"which is {self.fetch.base_model.kind}"
            )
        if not hub and self.tokenizer.strategy != "train":
            yield "tokenizer.strategy must be train for a scratch base, which has no tokenizer to keep"
        if hub and self.tokenizer.strategy == "train":
            yield (
                "tokenizer.strategy must be keep or extend for a hub base: the ids of a new vocabulary would pick "
                "the pre-trained embeddings of other tokens"
            )
        if self.split.pack_tokens < self.tokenize.max_tokens:
            yield (
                f"split.pack_tokens ({self.split.pack_tokens}) must be at least "
                f"tokenize.max_tokens ({self.tokenize.max_tokens})"
            )
        yield from self._unnamed_sources()
        made = [entry.type for entry in self.quantize_gguf.types]
        if self.ollama_modelfile.quantization not in made:
            yield (
                f"ollama_modelfile.quantization ({self.ollama_modelfile.quantization}) must be one of "
                f"quantize_gguf.types ({', '.join(made)})"
            )
        if self.base.scratch is not None:
            yield from self._longer_than(self.base.scratch)

    def _unnamed_sources(self) -> Iterator[str]:
        training = set(self.fetch.names("training"))
        if self.split.mix is not None and set(self.split.mix.shares) != training:
            yield (
                f"split.mix.shares must name the training sources ({', '.join(sorted(training))}), "
                f"it names {', '.join(sorted(self.split.mix.shares))}"
            )
        for key, names in (("style_sources", self.evaluate.style_sources), ("labels", self.evaluate.labels)):
            if unknown := sorted(set(names) - training):
                yield f"evaluate.{key} names {', '.join(unknown)}, which no training source is called"
        corpus = self.tokenizer.corpus if isinstance(self.tokenizer, TrainTokenizer) else None
        texts = training | set(self.fetch.names("tokenizer"))
        if corpus is not None and not set(corpus) <= texts:
            yield (
                f"tokenizer.corpus names {', '.join(sorted(set(corpus) - texts))}, which no source for training or "
                f"tokenizer is called; there are: {', '.join(sorted(texts))}"
            )

    def _longer_than(self, shape: ScratchModel) -> Iterator[str]:
        lengths = {
            "base.scratch.row_tokens": shape.row_tokens,
            "tokenize.max_tokens": self.tokenize.max_tokens,
            "split.pack_tokens": self.split.pack_tokens,
            "ollama_modelfile.num_ctx": self.ollama_modelfile.num_ctx,
        }
        for key, tokens in lengths.items():
            if tokens > shape.max_position_tokens:
                yield (
                    f"{key} ({tokens}) must be at most base.scratch.max_position_tokens ({shape.max_position_tokens})"
                )


def load_params(path: Path) -> Params:
    """Read and check params.yaml; raises one ParamsError that lists every fault by key."""
    try:
        content: Any = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError("file is missing", path, "make recipe NAME=smoke") from None
    except (YAMLError, UnicodeDecodeError) as fault:
        raise ParamsError(f"not valid YAML: {fault}", path, "mend the line named above") from None
    try:
        return Params.model_validate(content)
    except ValidationError as fault:
        lines = [_describe(error) for error in fault.errors()]
        remedy = "mend these keys, or start again from a recipe: make recipe NAME=smoke"
        raise ParamsError(f"{len(lines)} fault(s):\n" + "\n".join(lines), path, remedy) from None


def section(params: Params, name: str) -> Any:
    """The value of a key of params.yaml: `split` for a section, `split.test_share` for one of its values."""
    value: Any = params
    for part in name.split("."):
        value = value.registration if part == "register" else getattr(value, part)
    return value


def _describe(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"]) or "(sections together)"
    seen = "" if error["type"] in ("missing", "value_error") else f", got {error['input']!r}"
    return f"  - {key}: {error['msg']}{seen}"
