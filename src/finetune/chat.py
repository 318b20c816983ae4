"""A Modelfile -> a conversation in the terminal, prompted and stopped as Ollama would do it.

    python -m finetune.chat models/ollama/Modelfile [--ask "question"]

The prompt is the Modelfile's Go TEMPLATE rendered in Go, or the GGUF's own template where the Modelfile has a REQUIRES
(ollama_modelfile.renderer is jinja then); it is tokenised by llama.cpp, and the answer sampled with the Modelfile's
parameters. `/exit` or Ctrl-D ends; Ctrl-C ends the answer.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from finetune.errors import DataError, ExportError, FinetuneError
from finetune.export.gguf_vocab import encode
from finetune.export.gotemplate import GoRequest, render_go
from finetune.log import logger, setup_logging
from finetune.serving.requests import OLLAMA_MIN_P, OLLAMA_TOP_K
from finetune.serving.served import ServedModel, open_served
from finetune.tools import GOTEMPLATE, tool_path

with contextlib.suppress(ImportError):
    # Imported for what it does to input(): arrow keys move and recall, instead of being written into the question.
    import readline  # noqa: F401

EXIT = "/exit"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass
class Conversation:
    """A served model and the turns so far, oldest first; turns that no longer fit into num_ctx are forgotten."""

    served: ServedModel
    go_program: Path
    turns: list[dict[str, str]] = field(default_factory=list)

    def answer(self, question: str) -> Iterator[str]:
        """Yield the pieces of the answer to `question`, and remember both; raises ExportError if it cannot fit."""
        turns = [*self.turns, {"role": "user", "content": question}]
        ids = self.prompt_ids(turns)
        while len(ids) >= self.served.modelfile.num_ctx and len(turns) > 1:
            turns = turns[2:]
            ids = self.prompt_ids(turns)
        if len(ids) >= self.served.modelfile.num_ctx:
            raise ExportError(
                f"the question takes {len(ids)} tokens, num_ctx is {self.served.modelfile.num_ctx}",
                "question",
                "ask a shorter question, or raise ollama_modelfile.num_ctx in params.yaml",
            )
        pieces: list[str] = []
        try:
            for piece in self._complete(ids):
                pieces.append(piece)
                yield piece
        finally:
            self.turns = [*turns, {"role": "assistant", "content": "".join(pieces)}]

    def prompt_ids(self, turns: list[dict[str, str]]) -> list[int]:
        """Token ids of the turns as Ollama would prompt them."""
        modelfile = self.served.modelfile
        if modelfile.requires:
            return self.served.prompt(turns, [])[1]
        text = render_go(self.go_program, modelfile.template, [GoRequest(system=modelfile.system, messages=turns)])[0]
        return encode(self.served.llama, text, add_bos=True)

    def _complete(self, ids: list[int]) -> Iterator[str]:
        settings = self.served.modelfile
        stream = self.served.llama.create_completion(
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
    return Conversation(open_served(path, weights=True), tool_path(GOTEMPLATE))


def check_question(question: str) -> None:
    """Raise DataError for what a terminal can send and no one can mean: other encodings and control characters."""
    if any("\ud800" <= character <= "\udfff" for character in question):
        raise DataError("bytes that are not UTF-8", "question", "set the terminal to UTF-8, and type it again")
    if found := CONTROL.findall(question):
        codes = ", ".join(sorted({f"U+{ord(character):04X}" for character in found}))
        raise DataError(f"control characters ({codes})", "question", "type it again without such keys")


def shown(text: str) -> str:
    """The text with control characters spelled out, which a terminal would obey."""
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def say(conversation: Conversation, question: str) -> None:
    """Write the answer to stdout as it is made; Ctrl-C ends it. Raises FinetuneError for a question it cannot take."""
    check_question(question)
    try:
        for piece in conversation.answer(question):
            sys.stdout.write(shown(piece))
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stdout.write(" (stopped)")
    sys.stdout.write("\n")


def talk(conversation: Conversation) -> None:
    """Read questions until /exit or the end of input, and answer each."""
    terminal = sys.stdin.isatty()
    if terminal:
        logger.info("%s or Ctrl-D ends, Ctrl-C ends an answer", EXIT)
    while True:
        try:
            question = input(">>> " if terminal else "")
        except (EOFError, KeyboardInterrupt):
            sys.stdout.write("\n")
            return
        if question.strip() == EXIT:
            return
        if not question.strip():
            continue
        try:
            say(conversation, question)
        except FinetuneError as error:
            logger.error("%s", error)


def main() -> None:
    """Ask one question with --ask, else talk."""
    setup_logging("chat")
    parser = argparse.ArgumentParser(prog="python -m finetune.chat", description="talk to a model as Ollama serves it")
    parser.add_argument("modelfile", type=Path, help="such as models/ollama/Modelfile")
    parser.add_argument("--ask", metavar="QUESTION", help="ask once, write the answer, end")
    arguments = parser.parse_args()
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Bytes that are no text are then seen and refused, where the default is a traceback.
        sys.stdin.reconfigure(errors="surrogateescape")
    try:
        conversation = open_conversation(arguments.modelfile)
        if arguments.ask is None:
            talk(conversation)
        else:
            say(conversation, arguments.ask)
    except FinetuneError as error:
        logger.error("%s: %s", type(error).__name__, error)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
