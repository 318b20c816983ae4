"""A GGUF file -> its vocabulary, opened by llama.cpp without the weights, and the facts that serving depends on."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import llama_cpp

from finetune.errors import ExportError
from finetune.export.gguf_header import read_header

BOS_KEY = "tokenizer.ggml.bos_token_id"
# Without weights llama.cpp knows no context length, and warns of an overflow that cannot happen.
_SILENCE = llama_cpp.llama_log_callback(lambda _level, _text, _data: None)


@dataclass(frozen=True)
class GgufFacts:
    """`add_bos`: the server begins every prompt with BOS; `context_tokens`: the length the model was made for."""

    add_bos: bool
    context_tokens: int
    bos_token: str
    eos_token: str
    chat_template: str


def silence_llama() -> None:
    """Switch off llama.cpp's own log lines in this process."""
    llama_cpp.llama_log_set(_SILENCE, ctypes.c_void_p(0))


def open_vocab(gguf: Path) -> llama_cpp.Llama:
    """llama.cpp's tokenizer of a GGUF; raises ExportError when the file is missing, cut short or not a GGUF.

    llama.cpp refuses such a file too, but does not say why.
    """
    read_header(gguf)
    silence_llama()
    try:
        return llama_cpp.Llama(str(gguf), vocab_only=True, verbose=False)
    except ValueError as fault:
        raise ExportError(f"llama.cpp cannot open it: {fault}", gguf, "run `dvc repro -f quantize_gguf`") from None


def read_facts(vocab: llama_cpp.Llama, gguf: Path) -> GgufFacts:
    """The facts of an opened GGUF; raises ExportError when it embeds no chat template or no context length."""
    metadata = vocab.metadata
    length_key = f"{metadata.get('general.architecture', '')}.context_length"
    for key in ("tokenizer.chat_template", length_key):
        if key not in metadata:
            raise ExportError(f"the GGUF has no {key}", gguf, "run `dvc repro -f quantize_gguf`")
    handle = llama_cpp.llama_model_get_vocab(vocab.model)
    return GgufFacts(
        add_bos=bool(llama_cpp.llama_vocab_get_add_bos(handle)),
        context_tokens=int(metadata[length_key]),
        # Where the file names none, llama.cpp answers with an id of its own.
        bos_token=_token_text(vocab, llama_cpp.llama_vocab_bos(handle)) if BOS_KEY in metadata else "",
        eos_token=_token_text(vocab, llama_cpp.llama_vocab_eos(handle)),
        chat_template=metadata["tokenizer.chat_template"],
    )


def encode(vocab: llama_cpp.Llama, text: str, *, add_bos: bool) -> list[int]:
    """Token ids of `text`, special tokens recognised. `add_bos` lets the GGUF's metadata decide, as a server does."""
    return list(vocab.tokenize(text.encode(), add_bos=add_bos, special=True))


def ends_generation(vocab: llama_cpp.Llama, text: str) -> bool:
    """Whether `text` begins with a token at which llama.cpp and Ollama stop."""
    ids = encode(vocab, text, add_bos=False)
    handle = llama_cpp.llama_model_get_vocab(vocab.model)
    return bool(ids) and bool(llama_cpp.llama_vocab_is_eog(handle, ids[0]))


def _token_text(vocab: llama_cpp.Llama, token: int) -> str:
    if token < 0:
        return ""
    text: bytes = llama_cpp.llama_vocab_get_text(llama_cpp.llama_model_get_vocab(vocab.model), token)
    return text.decode()
