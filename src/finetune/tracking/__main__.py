"""What a person asks of the registry, from the command line.

python -m finetune.tracking ask models:/name@alias "question"     the answer of a registered version
python -m finetune.tracking promote [--name NAME] [--version N]   the gate between challenger and champion
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from finetune.errors import FinetuneError
from finetune.log import logger, printable, setup_logging
from finetune.params import load_params
from finetune.runtime import pin_cpu_code_path
from finetune.tracking.client import PATIENT, connect, refusals
from finetune.tracking.promotion import promote, told
from finetune.tracking.registry import ask_registered

PARAMS_FILE = Path("params.yaml")
NAME_WIDTH = 12


def main() -> None:
    """Run one of the two; exit code 1 says that MLflow, or the gate, refuses."""
    setup_logging("tracking")
    parser = argparse.ArgumentParser(prog="python -m finetune.tracking", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    ask = commands.add_parser("ask", help="ask a registered version one question")
    ask.add_argument("version", help="such as models:/finetune-smoke@champion")
    ask.add_argument("question")
    promotion = commands.add_parser("promote", help="give the challenger, or a version, the alias champion")
    promotion.add_argument("--name", help="the registered model; else register.model_name of params.yaml")
    promotion.add_argument("--version", default="", help="name/number, or its number alone; else the challenger")
    options = parser.parse_args()
    try:
        if options.command == "ask":
            pin_cpu_code_path()
            sys.stdout.write(printable(ask_registered(options.version, options.question)) + "\n")
        else:
            name, _, number = options.version.rpartition("/")
            _promote(options.name or name or load_params(PARAMS_FILE).registration.model_name, number)
    except FinetuneError as error:
        logger.error("%s: %s", type(error).__name__, error)
        raise SystemExit(1) from None


def _promote(name: str, number: str) -> None:
    client = connect(PATIENT, "make promote")
    with refusals("make promote"):
        outcome = promote(client, name, number)
    for label, text in told(name, outcome).items():
        sys.stdout.write(f"{label:<{NAME_WIDTH}}{text}\n")


if __name__ == "__main__":
    main()
