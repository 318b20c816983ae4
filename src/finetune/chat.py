"""A Modelfile -> a conversation in the terminal, prompted and stopped as Ollama would do it.

    python -m finetune.chat models/ollama/Modelfile [--ask "question"]

The prompt is the Modelfile's Go TEMPLATE rendered in Go, tokenised by llama.cpp (BOS by the GGUF's metadata), sampled
with the Modelfile's parameters. `/exit` or Ctrl-D ends; Ctrl-C ends the answer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import llama_cpp

from finetune.errors import DataError, ExportError, FinetuneError
from finetune.export.gguf_vocab import encode, silence_llama
from finetune.export.gotemplate import GoRequest, render_go
from finetune.export.modelfile import Modelfile, parse_modelfile
from finetune.log import logger, setup_logging
from finetune.tools import GOTEMPLATE, tool_path

EXIT = "/exit"
# What a Modelfile leaves out is Ollama's default (api/types.go, DefaultOptions), not llama-cpp-python's.
OLLAMA_TOP_K = 40
OLLAMA_MIN_P = 0.0


@dataclass
class Conversation:
    """A served model and the turns so far, oldest first; turns that no longer fit into num_ctx are forgotten."""

    modelfile: Modelfile
    model: llama_cpp.Llama
    go_program: Path
    turns: list[dict[str, str]] = field(default_factory=list)

    def answer(self, question: str) -> Iterator[str]:
        """Yield the pieces of the answer to `question`, and remember both; raises ExportError if it cannot fit."""
        self.turns.append({"role": "user", "content": question})
        ids = self._prompt_that_fits()
        pieces: list[str] = []
        try:
            for chunk in self._complete(ids):
                pieces.append(chunk)
                yield chunk
        finally:
            self.turns.append({"role": "assistant", "content": "".join(pieces)})

    def prompt_ids(self) -> list[int]:
        """Token ids of the turns so far as Ollama would prompt them."""
        request = GoRequest(system=self.modelfile.system, messages=self.turns)
        text = render_go(self.go_program, self.modelfile.template, [request])[0]
        return encode(self.model, text, add_bos=True)

    def _prompt_that_fits(self) -> list[int]:
        ids = self.prompt_ids()
        while len(ids) >= self.modelfile.num_ctx and len(self.turns) > 1:
            del self.turns[:2]
            ids = self.prompt_ids()
        if len(ids) >= self.modelfile.num_ctx:
            self.turns.clear()
            raise ExportError(
                f"the question takes {len(ids)} tokens, num_ctx is {self.modelfile.num_ctx}",
                "question",
                "ask a shorter question, or raise ollama_modelfile.num_ctx in params.yaml",
            )
        return ids

    def _complete(self, ids: list[int]) -> Iterator[str]:
        settings = self.modelfile
        stream = self.model.create_completion(
            ids,
            max_tokens=settings.num_ctx - len(ids),
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=OLLAMA_TOP_K,
            min_p=OLLAMA_MIN_P,
            repeat_penalty=settings.repeat_penalty,
            stop=list(settings.stops),
            stream=True,
        )
        for chunk in stream:
            yield chunk["choices"][0]["text"]


def open_conversation(path: Path) -> Conversation:
    """Load the Modelfile and its GGUF; raises FinetuneError when one is missing or cannot be read."""
    if not path.is_file():
        raise DataError("the Modelfile is missing", path, "run `dvc repro ollama_modelfile`")
    modelfile = parse_modelfile(path.read_bytes().decode())
    gguf = path.parent / modelfile.from_path
    if not gguf.is_file():
        raise DataError("the GGUF that FROM names is missing", gguf, "run `dvc repro ollama_modelfile`")
    silence_llama()
    try:
        model = llama_cpp.Llama(str(gguf), n_ctx=modelfile.num_ctx, verbose=False)
    except ValueError as fault:
        raise ExportError(f"llama.cpp cannot open it: {fault}", gguf, "run `dvc repro -f quantize_gguf`") from None
    return Conversation(modelfile, model, tool_path(GOTEMPLATE))


def say(conversation: Conversation, question: str) -> None:
    """Write the answer to stdout as it is made; Ctrl-C ends it."""
    try:
        for piece in conversation.answer(question):
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stdout.write(" (stopped)")
    sys.stdout.write("\n")


def talk(conversation: Conversation) -> None:
    """Read questions until /exit or the end of input, and answer each."""
    while True:
        try:
            question = input(">>> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            sys.stdout.write("\n")
            return
        if question.strip() == EXIT:
            return
        if not question.strip():
            continue
        try:
            say(conversation, question)
        except ExportError as error:
            logger.error("%s", error)


def main() -> None:
    """Ask one question with --ask, else talk."""
    setup_logging("chat")
    parser = argparse.ArgumentParser(prog="python -m finetune.chat", description="talk to a model as Ollama serves it")
    parser.add_argument("modelfile", type=Path, help="such as models/ollama/Modelfile")
    parser.add_argument("--ask", metavar="QUESTION", help="ask once, write the answer, end")
    arguments = parser.parse_args()
    try:
        conversation = open_conversation(arguments.modelfile)
        if arguments.ask is None:
            talk(conversation)
        else:
            say(conversation, arguments.ask)
    except FinetuneError as error:
        logger.error("%s: %s", type(error).__name__, error)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
