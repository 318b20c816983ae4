"""One log line format on stderr, and one progress bar for all long work."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
logger = logging.getLogger("finetune")
# What a terminal obeys, or shows as something else: control characters but for tab and newline, and the marks that
# turn the direction of text (https://www.unicode.org/reports/tr36, bidirectional text spoofing).
COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class PrintableFormatter(logging.Formatter):
    """Lines whose text cannot command the terminal: names of files, rows and templates come from anybody."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, what a terminal would obey spelled out."""
        return printable(super().format(record))


def printable(text: str) -> str:
    r"""The text with what a terminal would obey spelled out, such as \x1b."""
    return COMMANDS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def setup_logging(stage: str) -> None:
    """Log to stderr as `stage: message`; FINETUNE_LOG_LEVEL chooses the level (INFO if unset)."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PrintableFormatter(f"{stage}: %(message)s"))
    logger.handlers = [handler]
    logger.setLevel(os.environ.get("FINETUNE_LOG_LEVEL", "INFO"))
    logger.propagate = False


def progress_bar(total: int | None, done: int, unit: str, label: str) -> tqdm[Any]:
    """A bar with rate and ETA; where stderr is no terminal, a line every half minute instead of ten a second."""
    interval_s = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(total=total, initial=done, unit=unit, desc=label, mininterval=interval_s, file=sys.stderr)


def transfer_bar(**settings: Any) -> tqdm[Any]:
    """A bar of a transfer in bytes with its rate, shown after two seconds, and drawn as often as the one above."""
    interval_s = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(**settings, delay=2, mininterval=interval_s, file=sys.stderr)


def progress(items: Iterable[Item], total: int | None, unit: str, label: str) -> Iterator[Item]:
    """Iterate with such a bar."""
    with progress_bar(total, 0, unit, label) as bar:
        for item in items:
            yield item
            bar.update()


def quiet_libraries() -> None:
    """Leave out two messages that ask nothing of the user; errors and all other warnings stay.

    bitsandbytes regrets a CPU kernel that rounds to bfloat16, which this package keeps switched off; transformers
    announces names of version 6 for settings that TRL still reads under their present ones.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning)
