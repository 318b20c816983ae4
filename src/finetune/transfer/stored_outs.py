"""Outs that a dvc.lock names -> the folder of another clone, out of this one's DVC cache, else of its remote.

    python -m finetune.transfer.stored_outs MAIN FOLDER STAGE...

is the process that `take_outs` starts, for the reason that finetune.transfer.remote gives.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from finetune.lineage import without_passwords

THIS = "this-clone"


def take_outs(main: Path, folder: Path, stages: Sequence[str]) -> str:
    """Put the outs of these stages, as the dvc.lock of `folder` names them, in their place.

    Returns "" or, where not all of them are in the cache or the remote of `main`, what DVC said.
    """
    command = [sys.executable, "-m", "finetune.transfer.stored_outs", str(main), str(folder), *stages]
    # DVC looks for its targets from the current folder.
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    said = (done.stderr.strip() or "nothing").splitlines()[-1]
    return without_passwords(said)[:300] if done.returncode else ""


def main(arguments: Sequence[str]) -> int:
    """Pull the outs; returns the exit code."""
    from dvc.config import NoRemoteError  # type: ignore[import-untyped]
    from dvc.exceptions import CheckoutError  # type: ignore[import-untyped]
    from dvc.repo import Repo  # type: ignore[import-untyped]

    clone, folder, *stages = arguments
    with Repo(clone) as source:
        cache, remotes = source.cache.local_cache_dir, dict(source.config["remote"])
        named = source.config["core"].get("remote")
    # Given by hand and not written down: an address may hold a password.
    near = {"core": {"remote": THIS}, "remote": {THIS: {"url": cache}}}
    far = {"core": {"remote": named}, "remote": remotes}
    for config in (near, far) if named else (near,):
        with Repo(folder, config=config) as repo:
            try:
                repo.pull(targets=list(stages))
                return 0
            except (CheckoutError, NoRemoteError) as fault:
                sys.stderr.write(f"{fault}\n".replace("\n", " ") + "\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
