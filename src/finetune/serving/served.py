"""A Modelfile and its GGUF -> the prompts of a conversation, with the token ids that training gave them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp

from finetune.chat_template import ChatTemplate, compile_template
from finetune.data.encoding.chat import render_record
from finetune.data.record import Message, make_record
from finetune.errors import DataError, ExportError
from finetune.export.gguf_vocab import encode, open_vocab, read_facts, silence_llama
from finetune.export.modelfile import Modelfile, read_modelfile
from finetune.serving.pieces import WholePieces
from finetune.serving.requests import RequestError, read_messages


@dataclass(frozen=True)
class ServedModel:
    """A Modelfile, the GGUF that its FROM names, opened by llama.cpp, and the chat template in it."""

    modelfile: Modelfile
    gguf: Path
    llama: llama_cpp.Llama
    template: ChatTemplate

    def prompt(self, messages: Any, tools: list[Any]) -> tuple[str, list[int]]:
        """Text and ids of the prompt for OpenAI's messages and tools (empty: none).

        SYSTEM leads unless the first message is a system message, as in Ollama. Functions and calls are written as
        in the training rows. Raises RequestError for what the template refuses.
        """
        turns = read_messages(messages)
        if self.modelfile.system and turns[0].role != "system":
            turns.insert(0, Message("system", self.modelfile.system))
        definitions = json.dumps(tools, ensure_ascii=False) if tools else None
        try:
            record = make_record(source="request", messages=tuple(turns), tools=definitions)
            text = render_record(self.template, record, add_generation_prompt=True).text
            ids = encode(self.llama, text, add_bos=False)
        except DataError as fault:
            raise RequestError(fault.what, "messages") from None
        except UnicodeEncodeError:
            raise RequestError("half of a surrogate pair, which is no character", "messages") from None
        except RecursionError:
            raise RequestError("nested too deeply", "tools") from None
        return text, ids

    def check_room(self, ids: Sequence[int]) -> None:
        """Raise RequestError when num_ctx leaves no room for an answer to the prompt."""
        if len(ids) >= self.modelfile.num_ctx:
            raise RequestError(
                f"the prompt takes {len(ids)} tokens, num_ctx is {self.modelfile.num_ctx}: send less, or raise "
                "ollama_modelfile.num_ctx in params.yaml",
                "messages",
                "context_length_exceeded",
            )


def open_served(path: Path, *, weights: bool) -> ServedModel:
    """What the Modelfile at `path` serves; without `weights` llama.cpp only tokenises.

    Raises ExportError for a file that is missing or cannot be read.
    """
    modelfile, gguf = read_modelfile(path)
    llama = open_model(gguf, modelfile.num_ctx) if weights else open_vocab(gguf)
    facts = read_facts(llama, gguf)
    tokens = {"bos_token": facts.bos_token, "eos_token": facts.eos_token}
    template = compile_template(facts.chat_template, {name: text for name, text in tokens.items() if text}, gguf)
    return ServedModel(modelfile, gguf, llama, template)


def open_model(gguf: Path, num_ctx: int) -> llama_cpp.Llama:
    """The model with its weights and room for `num_ctx` tokens; raises ExportError when llama.cpp cannot open it."""
    silence_llama()
    try:
        llama = llama_cpp.Llama(str(gguf), n_ctx=num_ctx, verbose=False)
    except ValueError as fault:
        raise ExportError(f"llama.cpp cannot open it: {fault}", gguf, "run `dvc repro -f quantize_gguf`") from None
    llama.tokenizer_ = WholePieces(llama)
    return llama
