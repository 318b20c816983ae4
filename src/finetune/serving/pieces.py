"""token ids -> the bytes of an answer, long tokens included."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp

FIRST_BYTES = 64


class WholePieces:
    """The tokenizer that a llama_cpp.Llama uses, as its attribute `tokenizer_`.

    llama-cpp-python 0.3.36 reads a token's text into 32 bytes and drops a longer one from the answer without a word
    (_internals.py, detokenize). GPT-2's vocabulary has tokens of 128 bytes, Llama 3's runs of 128 spaces.
    """

    def __init__(self, llama: llama_cpp.Llama) -> None:
        self._vocab = llama_cpp.llama_model_get_vocab(llama.model)
        self._own = llama_cpp.LlamaTokenizer(llama)
        self._pieces: dict[tuple[int, bool], bytes] = {}

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = True) -> list[int]:
        """Token ids, as llama-cpp-python's own tokenizer gives them."""
        return list(self._own.tokenize(text, add_bos, special))

    def detokenize(self, tokens: Sequence[int], prev_tokens: Any = None, special: bool = False) -> bytes:  # noqa: ARG002
        """The bytes of all tokens; those of control tokens only if `special`."""
        return b"".join(self._piece(token, special) for token in tokens)

    def _piece(self, token: int, special: bool) -> bytes:
        if (token, special) not in self._pieces:
            buffer = ctypes.create_string_buffer(FIRST_BYTES)
            size = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, FIRST_BYTES, 0, special)
            if size < 0:
                buffer = ctypes.create_string_buffer(-size)
                size = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, -size, 0, special)
            self._pieces[token, special] = buffer.raw[:size]
        return self._pieces[token, special]
