"""argv -> one stage's run: paths by position, sections of params.yaml by name, errors as a message and exit code."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from finetune.errors import DataError, FinetuneError
from finetune.log import logger, setup_logging
from finetune.params import load_params, section

PARAMS_FILE = Path("params.yaml")
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


def stage_main(run: Callable[..., None], sections: Sequence[str]) -> None:
    """Call `run(*paths, **sections)` with the paths of argv and the named keys of params.yaml.

    A dotted key is passed by its last part: `split.test_share` as `test_share`.
    """
    setup_logging(Path(sys.argv[0]).stem)
    try:
        params = load_params(PARAMS_FILE)
        run(*map(Path, sys.argv[1:]), **{name.rpartition(".")[2]: section(params, name) for name in sections})
    except FinetuneError as error:
        logger.error("%s: %s", type(error).__name__, error)
        raise SystemExit(error.exit_code) from None
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        remedy = "free some space (`make doctor` says how much a run needs), then `dvc repro`"
        logger.error("DataError: %s", DataError(f"the disk is full ({error})", Path.cwd(), remedy))
        raise SystemExit(1) from None
