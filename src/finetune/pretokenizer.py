"""The word patterns that pre-tokenizers split by, as a tokenizer.json spells them."""

from __future__ import annotations

# Llama 3's (https://github.com/meta-llama/llama3/blob/main/llama/tokenizer.py). llama.cpp knows it by name
# (src/llama-vocab.cpp), so a model whose tokenizer was trained with it splits text in a GGUF as it was trained to.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")


def byte_characters() -> list[str]:
    """The character that stands for each of the 256 bytes in a byte-level vocabulary, as GPT-2 chose them.

    A byte that prints stands for itself; the others, in order, are the characters from U+0100 on.
    """
    printing = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printing]
    return [chr(byte) if byte in printing else chr(256 + others.index(byte)) for byte in range(256)]
