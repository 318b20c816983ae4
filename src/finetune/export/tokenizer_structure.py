"""tokenizer.json -> how llama.cpp must be told to split text, so that its ids are those of training.

llama.cpp's converter looks a tokenizer up by a hash over ids and by the class that its configuration names. Both fail
for a vocabulary trained at home, and the class fails silently: a SentencePiece vocabulary without its tokenizer.model
is written with the same score for every token. Here the file's own structure decides, and what llama.cpp cannot do as
the file says is refused. What it can do was read in src/llama-vocab.cpp of the pinned llama-cpp-python.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetune.errors import ExportError
from finetune.io import read_json
from finetune.pretokenizer import LLAMA3_PATTERN, QWEN2_PATTERN

TOKENIZER, SENTENCEPIECE_MODEL = "tokenizer.json", "tokenizer.model"
# SentencePiece's mark for a space, U+2581.
SPACE_MARK = "▁"
# Qwen 3.5's: as Qwen 2's, with combining marks among the letters.
QWEN35_PATTERN = QWEN2_PATTERN.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"\s\p{L}\p{N}]+", r"\s\p{L}\p{M}\p{N}]+")
# The pattern before a ByteLevel without one, and whether whole words skip the merges -> llama.cpp's name.
RULES = {
    (LLAMA3_PATTERN, False): "smaug-bpe",
    (LLAMA3_PATTERN, True): "llama-bpe",
    (QWEN2_PATTERN, False): "qwen2",
    (QWEN35_PATTERN, False): "qwen35",
}
# Normalizers that leave text in NFC, as `clean` writes it, unchanged.
HARMLESS_NORMALIZERS = {"NFC"}
REMEDY = "train the tokenizer with tokenizer.strategy: train, or choose a base model of another family"

# Where a mark for a space is put in front: of every piece of text between added tokens, of the text's beginning alone,
# or nowhere.
SpacePrefix = Literal["every piece", "beginning", "nowhere"]


@dataclass(frozen=True)
class Structure:
    """`model`: llama.cpp's tokenizer.ggml.model; `space_prefix` is "nowhere" for a byte-level BPE ("gpt2").

    `strict_spaces`: the mark is put before a text that begins with a space, too.
    """

    model: Literal["gpt2", "llama"]
    space_prefix: SpacePrefix
    strict_spaces: bool


def read_structure(folder: Path) -> Structure:
    """The structure of `folder`/tokenizer.json.

    Raises ExportError for a tokenizer that llama.cpp cannot follow, and for a SentencePiece vocabulary (a BPE over
    characters that falls back to bytes) without tokenizer.model, which holds the scores that llama.cpp merges by.
    """
    file = folder / TOKENIZER
    content = read_json(file)
    model, steps = content["model"], _steps(content.get("pre_tokenizer"), "pretokenizers")
    normalizers = _steps(content.get("normalizer"), "normalizers")
    if model["type"] == "BPE" and any(step["type"] == "ByteLevel" for step in steps):
        if unknown := [step["type"] for step in normalizers if step["type"] not in HARMLESS_NORMALIZERS]:
            raise ExportError(f"llama.cpp has no normalizer for a byte-level BPE: {', '.join(unknown)}", file, REMEDY)
        return Structure("gpt2", "nowhere", strict_spaces=True)
    if model["type"] != "BPE" or not model.get("byte_fallback", False):
        raise ExportError(
            f"llama.cpp follows a byte-level BPE and a SentencePiece BPE with byte fallback, this is a {model['type']}",
            file,
            REMEDY,
        )
    if not (folder / SENTENCEPIECE_MODEL).is_file():
        raise ExportError(
            f"a SentencePiece vocabulary without {SENTENCEPIECE_MODEL}, which holds the scores that llama.cpp needs",
            folder / SENTENCEPIECE_MODEL,
            f"set fetch.base_model to a revision that has {SENTENCEPIECE_MODEL} beside its {TOKENIZER}, "
            "then run `dvc repro`",
        )
    return _sentencepiece(normalizers, steps, file)


def _sentencepiece(normalizers: list[Any], steps: list[Any], file: Path) -> Structure:
    kinds = [step["type"] for step in normalizers]
    # Gemma splits at a space after its normalizer has replaced all of them: the step finds nothing.
    idle = [step for step in steps if step["type"] == "Split" and step["pattern"] == {"String": " "}]
    metaspace = [step for step in steps if step["type"] == "Metaspace"]
    if kinds == ["Prepend", "Replace"] and normalizers[0]["prepend"] == SPACE_MARK and not steps:
        return Structure("llama", "every piece", strict_spaces=True)
    if kinds == ["Replace"] and len(idle) == len(steps):
        return Structure("llama", "nowhere", strict_spaces=True)
    if not kinds and len(metaspace) == len(steps) == 1 and not metaspace[0]["split"]:
        prefixes: Mapping[str, SpacePrefix] = {"always": "every piece", "first": "beginning", "never": "nowhere"}
        prefix = prefixes[metaspace[0]["prepend_scheme"]]
        return Structure("llama", prefix, strict_spaces=prefix == "nowhere")
    raise ExportError(
        f"llama.cpp marks spaces otherwise than this tokenizer: normalizers {kinds}, "
        f"pre-tokenizers {[step['type'] for step in steps]}",
        file,
        REMEDY,
    )


def splitting_rule(tokenizer_json: Path) -> str:
    """llama.cpp's name for the pre-tokenizer of a byte-level BPE; raises ExportError for a rule it does not have."""
    content = read_json(tokenizer_json)
    steps = _steps(content["pre_tokenizer"], "pretokenizers")
    kinds = [step["type"] for step in steps]
    ignore_merges = content["model"].get("ignore_merges", False)
    # Files of older releases leave out what is the default; llama.cpp puts no blank before the first word.
    own_words = (
        kinds[-1:] == ["ByteLevel"] and steps[-1].get("use_regex", True) and not steps[-1].get("add_prefix_space", True)
    )
    if own_words and not ignore_merges:
        if kinds == ["ByteLevel"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
            return "smollm"
    pattern = steps[0].get("pattern", {}).get("Regex") if kinds == ["Split", "ByteLevel"] else None
    plain = steps[0].get("behavior", "Isolated") == "Isolated" and not steps[0].get("invert", False)
    if pattern is not None and plain and (pattern, ignore_merges) in RULES:
        return RULES[pattern, ignore_merges]
    raise ExportError(
        f"llama.cpp has no splitting rule like this tokenizer's: {kinds}, pattern {pattern!r}, "
        f"ignore_merges {ignore_merges}",
        tokenizer_json,
        "train the tokenizer with tokenizer.strategy: train, or keep the base model's own",
    )


def _steps(step: Mapping[str, Any] | None, parts: str) -> list[Any]:
    """The steps of a normalizer or pre-tokenizer, which may be none, one, or a Sequence of `parts`."""
    return [] if step is None else list(step.get(parts, [step]))
