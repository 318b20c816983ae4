"""What builds images here: Docker's daemon, else buildah as root, on a base of Debian's packages made by mmdebstrap.

buildah needs no daemon, no registry and no namespaces: it builds and runs in a chroot.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BASE, SUITE = "localhost/finetune-check-base", "bookworm"
# `python` stands for python:3.12-slim: it has Python and its venv module.
INCLUDED = {"plain": "ca-certificates", "python": "ca-certificates,python3,python3-venv"}
MOST_FILES, MOST_PROCESSES = 16384, 16384
# Where buildah 1.28 keeps the cache mount at /root/.cache, below TMPDIR.
CACHE_MOUNT = "buildah-cache/root/.cache"
BUILD_S, CALL_S = 5400, 1800


class CheckError(Exception):
    """The check itself cannot be done; the text says what to do."""


@dataclass(frozen=True)
class Engine:
    """`command` starts `docker` or `podman`; for buildah it is empty. `environment`: where images and layers lie."""

    name: str
    command: tuple[str, ...]
    work: Path
    environment: Mapping[str, str] = field(default_factory=dict)


def say(text: str) -> None:
    """One line to stderr."""
    sys.stderr.write(f"image-check: {text}\n")
    sys.stderr.flush()


def call(
    engine: Engine,
    *command: str,
    variables: Mapping[str, str] | None = None,
    timeout_s: int = CALL_S,
    show: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, whatever its exit code; `show` passes its output through instead of keeping it."""
    pipe = None if show else subprocess.PIPE
    return subprocess.run(
        command,
        env={**os.environ, **engine.environment, **(variables or {})},
        stdin=subprocess.DEVNULL,
        stdout=pipe,
        stderr=None if show else subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=timeout_s,
        check=False,
    )


def must(engine: Engine, *command: str) -> str:
    """The output of a command that has to succeed; raises CheckError."""
    done = call(engine, *command)
    if done.returncode != 0:
        raise CheckError(f"{' '.join(command[:2])} failed with status {done.returncode}\n{done.stdout[-4000:]}")
    return done.stdout


def docker_engine(work: Path) -> Engine | None:
    """Docker, where its daemon answers."""
    docker = Engine("docker", ("docker",), work)
    answers = shutil.which("docker") and call(docker, "docker", "version").returncode == 0
    return docker if answers else None


def buildah_engine(work: Path) -> Engine:
    """buildah with its storage below `work`; raises CheckError that says what to install."""
    missing = [name for name in ("buildah", "mmdebstrap") if not shutil.which(name)]
    if missing:
        raise CheckError(
            f"no Docker daemon answers, and without one this needs {' and '.join(missing)}\n"
            "  remedy: on Debian or Ubuntu: apt-get install buildah mmdebstrap (podman and runc as well, for `stop`)"
        )
    if os.getuid() != 0:
        raise CheckError("without a Docker daemon this needs root\n  remedy: sudo make image-check")
    return Engine("buildah", (), work, _storage(work))


def _storage(work: Path) -> dict[str, str]:
    """Images and layers below `work`, as overlays where the kernel lets us mount one, else as whole copies."""
    probe = work / "probe"
    for name in ("lower", "upper", "temporary", "merged"):
        (probe / name).mkdir(parents=True, exist_ok=True)
    options = f"lowerdir={probe}/lower,upperdir={probe}/upper,workdir={probe}/temporary"
    mount = ["mount", "-t", "overlay", "overlay", "-o", options, str(probe / "merged")]
    overlay = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    if overlay:
        subprocess.run(["umount", str(probe / "merged")], check=True)
    storage, containers = work / "storage.conf", work / "containers.conf"
    storage.write_text(
        f'[storage]\ndriver = "{"overlay" if overlay else "vfs"}"\n'
        f'graphroot = "{work}/storage"\nrunroot = "{work}/state"\n'
    )
    # podman asks for more open files than some machines let even root have.
    files = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], MOST_FILES)
    processes = min(resource.getrlimit(resource.RLIMIT_NPROC)[1], MOST_PROCESSES)
    limits = f'"nofile={files}:{files}", "nproc={processes}:{processes}"'
    containers.write_text(f"[containers]\ndefault_ulimits = [{limits}]\n")
    (work / "temporary").mkdir(exist_ok=True)
    return {
        "CONTAINERS_STORAGE_CONF": str(storage),
        "CONTAINERS_CONF": str(containers),
        # buildah keeps its cache mounts here.
        "TMPDIR": str(work / "temporary"),
    }


def make_base(engine: Engine, kind: str) -> str:
    """A base image of Debian's packages, made once; returns its name."""
    image = f"{BASE}:{kind}"
    if call(engine, "buildah", "inspect", "--type", "image", image).returncode == 0:
        return image
    archive = engine.work / f"{kind}.tar"
    options = ("--quiet", "--variant=minbase", f"--include={INCLUDED[kind]}")
    must(engine, "mmdebstrap", *options, SUITE, str(archive))
    container = must(engine, "buildah", "from", "scratch").strip().splitlines()[-1]
    must(engine, "buildah", "add", "--quiet", container, str(archive), "/")
    must(engine, "buildah", "commit", "--quiet", "--rm", container, image)
    archive.unlink()
    return image


def share_cache(engine: Engine) -> bool:
    """Give buildah's cache mount what `make setup` compiled for this user; whether there was a wheel of llama.cpp.

    The build takes it where compilers and flags are the same, else it compiles for itself, as it does without.
    """
    compiled = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune"
    if engine.name == "docker" or not list(compiled.glob("wheels/*/*.whl")):
        return False
    shutil.copytree(compiled, engine.work / "temporary" / CACHE_MOUNT / "finetune", dirs_exist_ok=True)
    return True


def build(
    engine: Engine,
    context: Path,
    dockerfile: str,
    image: str,
    arguments: Mapping[str, str],
    secrets: Mapping[str, Path],
    variables: Mapping[str, str],
) -> None:
    """Build an image and show the build's own output. `variables`: what the build's environment has besides."""
    flags = [flag for key, value in arguments.items() for flag in ("--build-arg", f"{key}={value}")]
    flags += [flag for key, file in secrets.items() for flag in ("--secret", f"id={key},src={file}")]
    if engine.name == "docker":
        # --load: a builder of its own, as CI has one, would keep the result to itself.
        tool = ["docker", "build", "--load", "--progress", "plain"]
    else:
        # Docker's image format: STOPSIGNAL and SHELL are not in OCI's.
        tool = ["buildah", "bud", "--isolation", "chroot", "--format", "docker", "--layers", "--pull-never"]
    command = [*tool, *flags, "--tag", image, "--file", str(context / dockerfile), str(context)]
    done = call(engine, *command, variables=variables, timeout_s=BUILD_S, show=True)
    if done.returncode != 0:
        raise CheckError(f"the build of {dockerfile} failed with status {done.returncode}; its output is above")


def save(engine: Engine, image: str, archive: Path) -> None:
    """Write the image with every layer and its configuration to one archive."""
    archive.unlink(missing_ok=True)
    if engine.name == "docker":
        must(engine, "docker", "save", "--output", str(archive), image)
    else:
        must(engine, "buildah", "push", "--quiet", image, f"docker-archive:{archive}:{image}")


def configuration(engine: Engine, image: str) -> dict[str, Any]:
    """User, Env, Entrypoint, Cmd, StopSignal, Labels and WorkingDir of an image."""
    if engine.name == "docker":
        return dict(json.loads(must(engine, "docker", "image", "inspect", image))[0]["Config"])
    return dict(json.loads(must(engine, "buildah", "inspect", "--type", "image", image))["Docker"]["config"])
