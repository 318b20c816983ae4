"""requirements/*.txt, pyproject.toml -> .venv and .tools (GGUF converter, Go template renderer); skips what is done.

Standard library only: it runs before anything is installed. `make setup` and docker/Dockerfile both call it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
REQUIREMENT_FILES = ["data", "train", "export", "pipeline", "serve", "remotes", "dev"]
COMPILERS_FILE = "llama-compilers.txt"
CONVERTER_PARTS = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/gguf/", "LICENSE")


class SetupError(Exception):
    """The environment cannot be made; the text says what to do."""


def say(text: str) -> None:
    """Write one line to stderr."""
    sys.stderr.write(f"setup: {text}\n")
    sys.stderr.flush()


def digest(*parts: Path | str) -> str:
    """Hash texts and the contents of files; a folder counts with all files below it."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            total.update(part.encode() + b"\0")
            continue
        for file in sorted(part.rglob("*")) if part.is_dir() else [part]:
            if file.is_file() and "__pycache__" not in file.parts:
                total.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return total.hexdigest()


def run(*command: str | Path, environment: dict[str, str] | None = None) -> None:
    """Run a command; its failure ends the setup with the command's own output above."""
    try:
        subprocess.run([str(part) for part in command], check=True, cwd=ROOT, env=environment)
    except subprocess.CalledProcessError as error:
        shown = " ".join(str(part) for part in command)
        raise SetupError(
            f"this command failed with status {error.returncode} (see its output above):\n  {shown}"
        ) from None


def once(stamps: Path, step: str, key: str, made: Path, action: Callable[[], None], label: str) -> None:
    """Do `action` unless `made` exists and the step was last finished with the same key."""
    done = json.loads(stamps.read_text()) if stamps.exists() else {}
    if done.get(step) == key and made.exists():
        return
    say(label)
    action()
    done[step] = key
    temporary = stamps.with_suffix(".tmp")
    temporary.write_text(json.dumps(done, indent=1, sort_keys=True) + "\n")
    temporary.replace(stamps)


def make_venv(venv: Path) -> None:
    """Create the virtual environment, anew if the folder was moved here from elsewhere (venvs hold absolute paths)."""
    python = venv / "bin" / "python"
    home = venv / "made-in"
    if home.exists() and home.read_text() == str(venv) and python.exists():
        return
    if venv.is_symlink():
        raise SetupError(f"{venv} is a link to {venv.resolve()}\n  remedy: rm {venv}, then run make setup again")
    say(f"new virtual environment with Python {platform.python_version()}")
    try:
        run(sys.executable, "-m", "venv", "--clear", venv)
    except SetupError as error:
        raise SetupError(f"{error}\n  remedy: on Debian and Ubuntu, apt-get install python3-venv") from None
    home.write_text(str(venv))


def pinned(name: str) -> str:
    """Read `name==version` out of the lock, as text for pip."""
    for line in (REQUIREMENTS / "lock.txt").read_text().splitlines():
        if line.lower().startswith(f"{name}=="):
            return line.strip()
    raise SetupError(f"requirements/lock.txt has no line {name}==...")


def pip(venv: Path, verb: str, *arguments: str | Path, environment: dict[str, str] | None = None) -> None:
    """Run pip of the virtual environment under the lock."""
    run(
        *(venv / "bin" / "python", "-m", "pip", verb, "--disable-pip-version-check"),
        *([] if sys.stderr.isatty() else ["-qq"]),
        *arguments,
        environment=environment,
    )


def fetch_sdist(venv: Path, cache: Path) -> Path:
    """Download the llama-cpp-python source archive once per user; pip checks its hash."""
    folder = cache / "sdist"
    name = f"{pinned('llama-cpp-python').replace('-', '_').replace('==', '-')}.tar.gz"
    if not (folder / name).exists():
        say(f"downloading {name} (77 MB)")
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            pip(
                *(venv, "download", "--no-deps", "--no-build-isolation", "--no-binary", "llama-cpp-python"),
                *("--dest", temporary, "-r", REQUIREMENTS / "llama-sdist.txt"),
            )
            folder.mkdir(exist_ok=True)
            (Path(temporary) / name).replace(folder / name)
    return folder / name


def compilers() -> list[str]:
    """Name the C and the C++ compiler that CMake takes, with versions; raises SetupError where one is missing."""
    named = []
    for fault, variable, usual in (("no C compiler", "CC", "cc"), ("no C++ compiler", "CXX", "c++")):
        command = shlex.split(os.environ.get(variable) or usual)
        try:
            answer = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            raise SetupError(
                f"{fault} ({' '.join(command)}) to build llama-cpp-python with\n"
                "  remedy: on Debian and Ubuntu, apt-get install g++; on macOS, xcode-select --install"
            ) from None
        named.append(f"{' '.join(command)}: {answer.stdout.splitlines()[0]}")
    return named


def cmake_arguments() -> list[str]:
    """Read what llama-cpp-python is built with."""
    lines = (REQUIREMENTS / "llama-build.txt").read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def llama_wheel(venv: Path, cache: Path) -> Path:
    """Build llama-cpp-python once per user, version, flags and compilers; later clones find the wheel."""
    made_by = [*cmake_arguments(), *compilers(), *platform.libc_ver(), platform.system(), platform.machine()]
    folder = cache / "wheels" / digest(pinned("llama-cpp-python"), *made_by)[:16]
    found = sorted(folder.glob("llama_cpp_python-*.whl"))
    if found:
        return found[0]
    archive = fetch_sdist(venv, cache)
    say("building llama-cpp-python (about 3 minutes on 2 cores, 1.1 GB of memory)")
    path = f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "CMAKE_ARGS": " ".join(cmake_arguments()), "PATH": path}
    for flags in ("CFLAGS", "CXXFLAGS", "CPPFLAGS"):
        environment.pop(flags, None)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        pip(
            *(venv, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", temporary, archive),
            environment=environment,
        )
        (built,) = Path(temporary).glob("*.whl")
        folder.mkdir(parents=True, exist_ok=True)
        built.replace(folder / built.name)
    return folder / built.name


def install_llama(venv: Path, cache: Path) -> None:
    """Install the wheel, also over another build of the same version, and write down what compiled it."""
    pip(venv, "install", "--no-deps", "--force-reinstall", llama_wheel(venv, cache))
    (venv / COMPILERS_FILE).write_text("\n".join(compilers()) + "\n")


def check_torch_build(venv: Path, torch: str) -> None:
    """Refuse TORCH=cpu over a CUDA build: pip would call it installed, and its gigabytes of CUDA would stay."""
    versions = list(venv.glob("lib/python*/site-packages/torch/version.py"))
    if torch != "cpu" or not versions:
        return
    lines = versions[0].read_text().splitlines()
    if not any(line.startswith("cuda:") and line.endswith("= None") for line in lines):
        raise SetupError(
            "TORCH=cpu was asked for, but the environment holds the CUDA build of torch\n"
            "  remedy: make clean-tools, then make setup TORCH=cpu"
        )


def install(venv: Path, cache: Path, names: list[str], torch: str) -> None:
    """Install the named requirement files under the lock."""
    locked = ["-c", str(REQUIREMENTS / "lock.txt")]
    pip(venv, "install", *locked, "-r", REQUIREMENTS / "build.txt")
    if torch == "cpu":
        pip(venv, "install", *locked, "--no-deps", "--extra-index-url", PYTORCH_CPU_INDEX, pinned("torch"))
        check_torch_build(venv, torch)
    if "export" in names:
        install_llama(venv, cache)
    files = [argument for name in names for argument in ("-r", str(REQUIREMENTS / f"{name}.txt"))]
    pip(venv, "install", *locked, *files)


def extract_converter(archive: Path, target: Path) -> None:
    """Take llama.cpp's converter, its package and its own gguf (not the package index's) out of the source archive."""
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        made = Path(temporary) / "convert"
        with tarfile.open(archive) as tar:
            for member in tar:
                inside = member.name.partition("/vendor/llama.cpp/")[2]
                content = tar.extractfile(member) if inside.startswith(CONVERTER_PARTS) else None
                if content is not None:
                    file = made / inside.removeprefix("gguf-py/")
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(content.read())
        if not (made / "convert_hf_to_gguf.py").exists() or not (made / "gguf" / "__init__.py").exists():
            raise SetupError(f"{archive} does not hold llama.cpp's converter where version 0.3.36 has it")
        shutil.rmtree(target, ignore_errors=True)
        made.replace(target)


def build_gotemplate(venv: Path, target: Path) -> None:
    """Compile the small Go program that renders Ollama templates."""
    target.parent.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "PATH": f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }
    run(venv / "bin" / "python", "-m", "finetune.tools", "gotemplate", target, environment=environment)


def set_up(options: argparse.Namespace) -> None:
    """Bring the environment and the tools up to what the files ask for."""
    venv, tools = options.venv.absolute(), options.tools.absolute()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune"
    cache.mkdir(parents=True, exist_ok=True)
    tools.mkdir(parents=True, exist_ok=True)
    make_venv(venv)
    check_torch_build(venv, options.torch)
    stamps, package = venv / "setup.json", ROOT / "src" / "finetune"
    converter, renderer = tools / "convert", tools / "bin" / "gotemplate"
    steps: list[tuple[str, str, Path, Callable[[], None], str]] = [
        (
            "packages",
            digest(REQUIREMENTS, *options.requirements),
            venv / "bin" / "python",
            lambda: install(venv, cache, options.requirements, options.torch),
            f"packages of requirements/: {', '.join(options.requirements)} (some minutes the first time)",
        ),
        (
            "converter",
            digest(REQUIREMENTS / "llama-sdist.txt", *CONVERTER_PARTS),
            converter,
            lambda: extract_converter(fetch_sdist(venv, cache), converter),
            "GGUF converter from the llama-cpp-python source",
        ),
        (
            "gotemplate",
            digest(REQUIREMENTS / "export.txt", package / "tools.py", package / "export" / "gotemplate"),
            renderer,
            lambda: build_gotemplate(venv, renderer),
            "renderer of Go templates",
        ),
    ]
    if not options.no_package:
        steps.append(
            (
                "package",
                digest(ROOT / "pyproject.toml"),
                venv / "bin" / "python",
                lambda: pip(venv, "install", "--no-deps", "--no-build-isolation", "--editable", ROOT),
                "this package, editable",
            )
        )
    for step in steps:
        once(stamps, *step)


def main() -> int:
    """Parse the options, set up, and turn a SetupError into its message and status 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--tools", type=Path, default=ROOT / ".tools")
    parser.add_argument(
        "--torch", choices=["", "cpu"], default="", help="cpu: from PyTorch's CPU index; empty: pip's choice"
    )
    parser.add_argument("--no-package", action="store_true", help="do not install this repository's own package")
    parser.add_argument("--requirements", nargs="+", default=REQUIREMENT_FILES)
    try:
        set_up(parser.parse_args())
    except SetupError as error:
        say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
