"""Build the images of docker/ and run them: `make image-check`; writes benchmarks/image.json. Standard library only.

The CPU image is built from docker/Dockerfile as it stands, with tokens planted in the build's environment, in its
context and in pip's configuration; then it is taken apart, and the smoke pipeline runs in it as a user without a passwd
entry: to its end, again, stopped and killed in the middle of training. The MLflow image is built and asked as clients
ask. Takes about half an hour on two cores and 20 GB of disk, which are free again at the end.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pipeline_checks
import server_checks
from archive import holding, read_image
from clones import ROOT, make_context
from engine import CheckError, Engine, build, call, make_base, save, say, share_cache
from jobs import find_engine
from pip_inputs import pip_secrets

IMAGE, SERVER = "localhost/finetune-check:cpu", "localhost/finetune-check-mlflow:1"
RESULT = ROOT / "benchmarks/image.json"
# What a Docker daemon pulls; elsewhere the bases are made here.
PULLED = {"plain": "ubuntu:24.04", "python": "python:3.12-slim-bookworm"}
REVISION = "0" * 40
# Texts of files in the images: the search that must not find the token has to find these.
KNOWN = {IMAGE: b"refusing to run as root", SERVER: b"it answers a search under the name that clients use"}
OPENCONTAINERS = "org.opencontainers.image."
# No time of creation: equal builds would differ in it.
LABELS = {"title", "description", "licenses", "base.name", "version", "revision", "source"}


class Results:
    """Name -> whether a check passed, in the order in which they were made."""

    def __init__(self) -> None:
        self.checks: dict[str, bool] = {}

    def record(self, name: str, passed: bool, seen: str) -> None:
        """Keep a result; of a failed check, show what was seen."""
        self.checks[name] = passed
        say(f"{'passed' if passed else 'FAILED'}: {name}")
        if not passed:
            sys.stderr.write(f"{seen}\n")


def build_one(engine: Engine, kind: str, dockerfile: str, image: str, token: str) -> dict[str, Any]:
    """Build with the token planted in environment, context and pip's configuration; returns base and seconds."""
    base = PULLED[kind] if engine.name == "docker" else make_base(engine, kind)
    arguments = {"BASE_IMAGE": base, "REVISION": REVISION, **({"TORCH": "cpu"} if kind == "plain" else {})}
    make_context(engine.work / "context", token)
    began = time.monotonic()
    with pip_secrets(engine.work, token, loopback=engine.name != "docker") as given:
        variables = {name: token for name in ("HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY")}
        build(engine, engine.work / "context", dockerfile, image, arguments, given, variables)
    return {"base": base, "build_s": round(time.monotonic() - began, 1)}


def take_apart(engine: Engine, image: str, token: str, results: Results) -> dict[str, Any]:
    """Layers by size and what the configuration says; the planted token may be in neither."""
    archive, name = engine.work / "image.tar", "image" if image == IMAGE else "server"
    save(engine, image, archive)
    saved, layers = read_image(archive)
    found = holding(archive, (token.encode(), KNOWN[image]))
    archive.unlink()
    results.record(f"{name}_holds_no_planted_token", found[token.encode()] == [], str(found))
    results.record(f"{name}_is_searched_in_every_layer", found[KNOWN[image]] != [], "a known text was not found")
    config = saved["config"]
    labels = {key.removeprefix(OPENCONTAINERS) for key in config.get("Labels", {}) if key.startswith(OPENCONTAINERS)}
    results.record(f"{name}_has_its_labels", labels == LABELS, str(labels))
    user = str(config.get("User", "")).partition(":")[0]
    results.record(f"{name}_is_not_roots", user.isdigit() and user != "0", user)
    if image == IMAGE:
        results.record("image_stops_by_sigint", config.get("StopSignal") == "SIGINT", str(config.get("StopSignal")))
    total = sum(layer["size_bytes"] for layer in layers)
    return {"layers": layers, "total_bytes": total}


def machine() -> dict[str, Any]:
    """What times depend on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    processor = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown")
    kib = int(Path("/proc/meminfo").read_text(encoding="utf-8").split()[1])
    cores = len(os.sched_getaffinity(0))
    return {"cores": cores, "processor": processor, "memory_gib": round(kib / (1 << 20), 1)}


def check(engine: Engine, results: Results) -> dict[str, Any]:
    """Build, take apart and run both images; returns what is measured."""
    token, clone = f"canary-{secrets.token_hex(16)}", engine.work / "clone"
    wheel = share_cache(engine)
    pipeline = build_one(engine, "plain", "docker/Dockerfile", IMAGE, token)
    # Compiling it takes most of a build without.
    pipeline["llama_wheel_given"] = wheel
    pipeline |= take_apart(engine, IMAGE, token, results)
    pipeline |= pipeline_checks.whole_pipeline(engine, IMAGE, clone, results.record)
    pipeline_checks.refusals(engine, IMAGE, clone, results.record)
    pipeline_checks.tools(engine, IMAGE, clone, results.record)
    for kill in (False, True):
        pipeline_checks.interrupted(engine, IMAGE, clone, results.record, kill=kill)
    server = build_one(engine, "python", "docker/mlflow/Dockerfile", SERVER, token)
    server |= take_apart(engine, SERVER, token, results)
    server_checks.server(engine, SERVER, engine.work, results.record)
    return {"pipeline": pipeline, "mlflow": server}


def clean_up(engine: Engine | None, work: Path) -> None:
    """Remove images, containers, caches and clones."""
    if engine is not None and engine.name == "docker":
        call(engine, "docker", "image", "rm", "--force", IMAGE, SERVER)
    elif engine is not None:
        call(engine, "buildah", "rm", "--all")
    # The storage mounts itself; what lies deeper was mounted later.
    mounted = [line.split()[1] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    for place in reversed([place for place in mounted if place.startswith(f"{work}/")]):
        subprocess.run(["umount", place], check=False)
    shutil.rmtree(work)


def main() -> int:
    """Check, write the result, remove what was made; returns 1 where a check failed or could not be made."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", choices=["any", "docker", "podman", "buildah"], default="any")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache/image-check", help="removed at the end")
    parser.add_argument("--keep", action="store_true", help="keep the work folder: a second check builds in seconds")
    options = parser.parse_args()
    work, engine, results = options.work.absolute(), None, Results()
    work.mkdir(parents=True, exist_ok=True)
    # Any UID has to reach the clones.
    work.chmod(0o755)
    try:
        engine = find_engine(work, options.engine)
        say(f"{engine.name}, in {work}")
        measured = check(engine, results)
    except CheckError as error:
        say(str(error))
        return 1
    finally:
        if not options.keep:
            clean_up(engine, work)
    failed = [name for name, passed in results.checks.items() if not passed]
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    content = {"date": today, "engine": engine.name, **machine(), **measured, "checks": results.checks}
    RESULT.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    say(f"{len(results.checks)} checks, failed: {', '.join(failed) or 'none'}; written to {RESULT}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
