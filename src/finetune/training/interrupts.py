"""SIGINT and SIGTERM -> a wish to stop, which the trainer grants after the step that it is in."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from finetune.log import logger

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopWish:
    """`signal_name` is empty until a signal came."""

    def __init__(self) -> None:
        self.signal_name = ""

    def note(self, number: int, _: Any) -> None:
        """Take the first signal as a wish; the second one ends the process at once, as it would have before."""
        self.signal_name = signal.Signals(number).name
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        logger.warning("%s: stopping after this step, with a checkpoint; once more stops at once", self.signal_name)


@contextmanager
def stop_wish() -> Iterator[StopWish]:
    """Take both signals as wishes inside the block, and put the earlier handlers back behind it."""
    wish = StopWish()
    earlier = {number: signal.signal(number, wish.note) for number in SIGNALS}
    try:
        yield wish
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
