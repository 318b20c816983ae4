"""A Modelfile -> its model behind OpenAI's interface on a port of this machine, prompted as it was trained.

    python -m finetune.serve models/ollama/Modelfile [--port 8000] [--host 127.0.0.1]

Ctrl-C ends it. FINETUNE_LOG_LEVEL=DEBUG shows the token ids of every prompt.
"""

from __future__ import annotations

import argparse
import errno
import os
import socket
from pathlib import Path

import uvicorn

from finetune.errors import ExportError, FinetuneError
from finetune.log import logger, setup_logging
from finetune.params import load_params
from finetune.serving.app import LOOPBACK, build_app
from finetune.serving.served import open_served

PARAMS_FILE = Path("params.yaml")
# An answer that is being written when Ctrl-C comes is cut off after this.
LAST_WORDS_S = 2


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; raises ExportError when the port is taken, not allowed, or the host is not here."""
    try:
        return socket.create_server((host, port))
    except (OSError, OverflowError) as fault:
        taken = isinstance(fault, OSError) and fault.errno == errno.EADDRINUSE
        raise ExportError(
            "another program listens there already" if taken else f"cannot listen there: {fault}",
            f"{host}:{port}",
            "end that program, or take another port: make serve PORT=8001",
        ) from None


def serve(modelfile: Path, host: str, port: int) -> None:
    """Answer until Ctrl-C; raises FinetuneError when a file is missing or the port cannot be had."""
    served = open_served(modelfile, weights=False)
    name = load_params(PARAMS_FILE).registration.model_name
    with listen(host, port) as listener:
        if host not in LOOPBACK:
            logger.warning("on %s everyone who reaches this machine can use the model: there is no password", host)
        try:
            app = build_app(served, name, LOOPBACK if host in LOOPBACK else ["*"])
        except ValueError as fault:
            raise ExportError(
                f"llama.cpp cannot open it: {fault}", served.gguf, "run `dvc repro -f quantize_gguf`"
            ) from None
        shown = f"http://{host}:{listener.getsockname()[1]}/v1"
        logger.info("%s answers at %s (Ctrl-C ends it)", name, shown)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=LAST_WORDS_S
        )
        uvicorn.Server(config).run(sockets=[listener])


def main() -> None:
    """Read the arguments and serve."""
    setup_logging("serve")
    parser = argparse.ArgumentParser(prog="python -m finetune.serve", description="serve a model on this machine")
    parser.add_argument("modelfile", type=Path, help="such as models/ollama/Modelfile")
    parser.add_argument("--port", type=int, default=8000, help="0: a free one")
    parser.add_argument("--host", default="127.0.0.1", help="another one lets other machines in, without a password")
    arguments = parser.parse_args()
    try:
        serve(arguments.modelfile, arguments.host, arguments.port)
    except FinetuneError as error:
        logger.error("%s: %s", type(error).__name__, error)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        logger.info("ended")
        # A thread that computes an answer cannot be told to stop, and Python would wait for it: minutes, at worst.
        os._exit(0)


if __name__ == "__main__":
    main()
