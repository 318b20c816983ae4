"""The word patterns that pre-tokenizers split by, as a tokenizer.json spells them."""

from __future__ import annotations

# Llama 3's (https://github.com/meta-llama/llama3/blob/main/llama/tokenizer.py). llama.cpp knows it by name
# (src/llama-vocab.cpp), so a model whose tokenizer was trained with it splits text in a GGUF as it was trained to.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
