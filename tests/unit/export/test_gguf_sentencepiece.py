"""The architectures with a SentencePiece vocabulary through the real converter, and a vocabulary of two minds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_gguf_architectures import Converted, check_logits, check_metadata, check_vocabulary, convert
from tiny_models import write_model

from finetune.errors import ExportError
from finetune.export import gguf

TYPES = {
    "MistralForCausalLM": {"F32": 5, "Q8_0": 16},
    "GemmaForCausalLM": {"F32": 5, "Q8_0": 15},
    "Gemma2ForCausalLM": {"F32": 9, "Q8_0": 15},
    "Gemma3ForCausalLM": {"F32": 13, "Q8_0": 15},
    "Phi3ForCausalLM": {"F32": 5, "Q8_0": 10},
}


@pytest.fixture(scope="module", params=TYPES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    return convert(request.param, tmp_path_factory.mktemp(request.param))


def test_logits_types_ids_and_metadata(made: Converted) -> None:
    check_logits(made, TYPES[made.architecture])
    check_vocabulary(made)
    check_metadata(made)


def test_a_model_file_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, "MistralForCausalLM")
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["d"], vocabulary["l"] = vocabulary["l"], vocabulary["d"]
    file.write_text(json.dumps(content))
    with pytest.raises(ExportError, match=r"is '[dl]' in tokenizer\.model and '[dl]' here"):
        gguf.convert(tmp_path, tmp_path / "x.gguf", "f32", "tiny", {})
    assert not (tmp_path / "x.gguf").exists()


def test_without_the_model_file_nothing_is_converted(tmp_path: Path) -> None:
    write_model(tmp_path, "GemmaForCausalLM")
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(ExportError, match=r"a SentencePiece vocabulary without tokenizer\.model"):
        gguf.convert(tmp_path, tmp_path / "x.gguf", "f32", "tiny", {})
