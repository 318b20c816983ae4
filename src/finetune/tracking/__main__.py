"""`python -m finetune.tracking ask models:/name@alias "question"` -> the answer of a registered version."""

from __future__ import annotations

import sys

from finetune.errors import TrackingError
from finetune.log import setup_logging
from finetune.runtime import pin_cpu_code_path
from finetune.tracking.registry import ask_registered


def main() -> None:
    """Print the answer of a registered version to one question."""
    setup_logging("tracking")
    pin_cpu_code_path()
    if len(sys.argv) != 4 or sys.argv[1] != "ask":
        raise SystemExit('usage: python -m finetune.tracking ask models:/name@alias "question"')
    try:
        sys.stdout.write(ask_registered(*sys.argv[2:]) + "\n")
    except TrackingError as error:
        raise SystemExit(f"TrackingError: {error}") from None


if __name__ == "__main__":
    main()
