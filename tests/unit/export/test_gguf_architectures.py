"""Small random checkpoints through the real converter: logits, token ids, tensor types and metadata, by architecture.

The GELU of llama.cpp's CPU code is a table of 16-bit numbers (ggml/src/ggml-cpu/vec.h, GGML_GELU_FP16): models that
use it, which are Gemma's and GPT-2, cannot come nearer than that table.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny_models import ARCHITECTURES, write_model
from transformers import AutoModelForCausalLM

from finetune.errors import ExportError
from finetune.evaluation.perplexity import model_logits
from finetune.export import gguf
from finetune.export.gguf_header import read_header
from finetune.export.gguf_types import tensor_types
from finetune.export.gguf_vocab import ends_generation, open_vocab
from finetune.export.vocabulary_proof import prove_vocabulary

# A file of its own converts the SentencePiece families: each file stays below some 20 s.
BYTE_LEVEL = {
    "LlamaForCausalLM": {"F32": 6, "Q8_0": 15},
    "Qwen2ForCausalLM": {"F32": 11, "Q8_0": 16},
    "Qwen3ForCausalLM": {"F32": 9, "Q8_0": 15},
    "GPT2LMHeadModel": {"F32": 19, "Q8_0": 9},
}
TABLE_OF_GELU = ("GPT2LMHeadModel", "Gemma2ForCausalLM", "Gemma3ForCausalLM")
IDS = list(range(7, 107))
METADATA = {"finetune.recipe": "tiny", "general.license": "MIT", "general.languages": ["en", "fr"]}


@dataclass(frozen=True)
class Converted:
    """A checkpoint's folder, its GGUF in 32 bit, and the one in Q8_0."""

    architecture: str
    merged: Path
    whole: Path
    small: Path


def convert(architecture: str, folder: Path) -> Converted:
    made = Converted(architecture, folder / "merged", folder / "whole.gguf", folder / "small.gguf")
    write_model(made.merged, architecture)
    gguf.convert(made.merged, made.whole, "f32", "finetune-tiny", METADATA)
    gguf.quantize(made.whole, made.small, "Q8_0", 1)
    return made


def check_logits(made: Converted, types: dict[str, int]) -> None:
    model = AutoModelForCausalLM.from_pretrained(made.merged).eval()
    expected = model_logits(model)(IDS)
    obtained = gguf.llama_logits(gguf.load(made.whole, 128, 1))(IDS)
    difference = float((expected - obtained).abs().max())
    assert difference < (1e-3 if made.architecture in TABLE_OF_GELU else 1e-4)
    if made.architecture in TABLE_OF_GELU:
        for module in model.modules():
            for name in {"act", "act_fn"} & set(dict(module.named_children())):
                setattr(module, name, TableOfGelu())
        # What remains are numbers that round to the other neighbour in the table.
        assert float((model_logits(model)(IDS) - obtained).abs().max()) < min(3e-4, 0.7 * difference)
    small = gguf.llama_logits(gguf.load(made.small, 128, 1))(IDS)
    assert mean_kl(expected, small) < 1e-3
    assert tensor_types(made.small) == types


class TableOfGelu(torch.nn.Module):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(values.half().float(), approximate="tanh").half().float()


def mean_kl(expected: torch.Tensor, obtained: torch.Tensor) -> float:
    p, q = expected.double().log_softmax(-1), obtained.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def check_vocabulary(made: Converted) -> None:
    for file in (made.whole, made.small):
        assert prove_vocabulary(made.merged, file) > 200
    # The template ends a turn with a token that is not eos.
    vocab = open_vocab(made.small)
    assert [ends_generation(vocab, text) for text in ("<|done|>", "</s>", "<|assistant|>")] == [True, True, False]


def check_metadata(made: Converted) -> None:
    whole, small = read_header(made.whole), read_header(made.small)
    assert {key: small[key] for key in METADATA} == METADATA
    differing = {key for key in whole.keys() | small.keys() if whole.get(key) != small.get(key)}
    assert differing == {"general.file_type"}
    # Nothing is guessed from the folder, and no other key names the machine.
    assert sorted(key for key in small if key.startswith("general.")) == [
        "general.architecture",
        "general.file_type",
        "general.languages",
        "general.license",
        "general.name",
        "general.quantization_version",
        "general.size_label",
        "general.type",
    ]
    assert str(made.merged.parent).encode() not in made.small.read_bytes()


@pytest.fixture(scope="module", params=BYTE_LEVEL)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    return convert(request.param, tmp_path_factory.mktemp(request.param))


def test_logits_and_types(made: Converted) -> None:
    check_logits(made, BYTE_LEVEL[made.architecture])


def test_token_ids_and_stops(made: Converted) -> None:
    check_vocabulary(made)


def test_metadata_is_in_the_quantised_file_too(made: Converted) -> None:
    check_metadata(made)


def test_an_architecture_that_the_converter_does_not_know_is_named(tmp_path: Path) -> None:
    write_model(tmp_path / "merged", "GPT2LMHeadModel")
    config = tmp_path / "merged" / "config.json"
    config.write_text(config.read_text().replace("GPT2LMHeadModel", "GPTXForCausalLM"))
    with pytest.raises(ExportError, match="Model GPTXForCausalLM is not supported"):
        gguf.convert(tmp_path / "merged", tmp_path / "x.gguf", "f32", "tiny", {})
    assert sorted(ARCHITECTURES) == sorted([*BYTE_LEVEL, "MistralForCausalLM", "Phi3ForCausalLM", *GEMMA])


GEMMA = ("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM")
