"""requirements/lock.txt, and the network -> known vulnerabilities of the locked versions, as OSV (osv.dev) has them.

Exit code 0: none is known. 1: some are, each shown with the versions that mend it. 2: OSV could not be asked, or not
for every package; that is not "none", and pip-audit alone gives it the same code as a vulnerability.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

LOCK = Path(__file__).resolve().parent.parent / "requirements" / "lock.txt"
# One version of each package, none resolved or installed: the lock is asked about, not this machine.
COMMAND = ("-m", "pip_audit", "--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json")


def say(text: str) -> None:
    """Write one line to stdout."""
    sys.stdout.write(f"{text}\n")


def main() -> int:
    """Ask, compare what was answered with the lock, and show what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--osv-url", default="https://api.osv.dev/v1/query")
    address = parser.parse_args().osv_url
    command = [sys.executable, *COMMAND, "--vulnerability-service", "osv", "--osv-url", address]
    done = subprocess.run([*command, "--requirement", str(LOCK)], capture_output=True, text=True, check=False)
    pinned = re.findall(r"^[\w.-]+==", LOCK.read_text(encoding="utf-8"), re.MULTILINE)
    answered: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"] if done.stdout.strip() else []
    answered = [package for package in answered if "vulns" in package]
    if len(answered) != len(pinned):
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no reason given"
        say(f"audit: {address} answered for {len(answered)} of {len(pinned)} packages\n  {reason}")
        say("  remedy: run it where that address can be reached; nothing is known about the lock now")
        return 2
    found = [(package, fault) for package in answered for fault in package["vulns"]]
    for package, fault in found:
        mended = ", ".join(fault["fix_versions"]) or "no version yet"
        names = ", ".join([fault["id"], *fault["aliases"]])
        say(f"{package['name']} {package['version']}: {names}; mended by {mended}")
    say(f"audit: {len(pinned)} packages of requirements/lock.txt, {len(found)} known vulnerabilities")
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
