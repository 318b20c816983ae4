"""A GGUF, its chat template and params -> refusals of what would be served otherwise than it was trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import llama_cpp

from finetune.chat_template import ChatTemplate, turn_end
from finetune.errors import ExportError
from finetune.export.gguf_vocab import GgufFacts, encode, ends_generation


def check_system(system: str, roles: Sequence[str]) -> None:
    """Raise ExportError where the Modelfile has a SYSTEM and the chat template no system role."""
    if system and "system" not in roles:
        raise ExportError(
            "the chat template has no system role",
            "params.yaml: ollama_modelfile.system",
            'set ollama_modelfile.system to ""',
        )


def check_turn_end(vocab: llama_cpp.Llama, facts: GgufFacts, chat: ChatTemplate, gguf: Path) -> str:
    """The text of the token that ends an answer; raises ExportError unless llama.cpp and Ollama stop at it.

    It need not be eos: a GGUF whose tokenizer.ggml.eot_token_id names it stops there as well.
    """
    end, eos = turn_end(chat), chat.tokens.get("eos_token")
    if facts.eos_token != eos or not ends_generation(vocab, end):
        raise ExportError(
            f"answers would never stop: the template ends them with {end!r}, at which the GGUF does not stop; its end "
            f"token is {facts.eos_token!r}, the tokenizer's {eos!r}",
            gguf,
            "end assistant messages with eos_token, or another special token, in the chat template; then `dvc repro`",
        )
    token = encode(vocab, end, add_bos=False)[0]
    text: bytes = llama_cpp.llama_vocab_get_text(llama_cpp.llama_model_get_vocab(vocab.model), token)
    return text.decode()
