"""dvc.lock, dvc.yaml, params.yaml and the code of this commit -> exit code 0 if a run of it would run nothing.

Works in a fresh clone without data, models or cache: an out that is not there counts as what dvc.lock says of it. The
exit code of `dvc repro --dry` alone is no answer: it is 0 when stages would run.
"""

from __future__ import annotations

import subprocess
import sys

COMMAND = ("-m", "dvc", "repro", "--dry", "--allow-missing")
REMEDY = "remedy: make repro, then commit dvc.lock, metrics/ and plots/ together with the change"


def main() -> int:
    """Ask DVC, and say which stages are out of date."""
    done = subprocess.run([sys.executable, *COMMAND], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    # Without data, DVC stops at the first stage that would have to read what is not there.
    begins = ("Running stage '", "ERROR: failed to reproduce '")
    stale = [line.split("'")[1] for line in [*lines, *done.stderr.splitlines()] if line.startswith(begins)]
    if done.returncode or stale or "Data and pipelines are up to date." not in lines:
        sys.stderr.write(f"{done.stdout}{done.stderr}\nlock-check: dvc.lock is not that of this tree\n")
        sys.stderr.write(f"  would run: {', '.join(stale) or 'see above'}, and what depends on it\n  {REMEDY}\n")
        return 1
    sys.stdout.write("lock-check: dvc.lock is that of this tree; a run would run nothing\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
