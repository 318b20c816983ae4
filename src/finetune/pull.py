"""A registered version, on a machine that did not make it -> its GGUF, Modelfile and template in one folder, verified.

    python -m finetune.pull NAME@ALIAS [--to FOLDER] [--type Q4_K_M] [--remote NAME]

The GGUF comes from the registry where the version holds it, else from DVC's remote. The folder appears, or is replaced,
once every SHA-256 is that of the version's tags. Its Modelfile is the version's own, but for FROM: the GGUF beside it.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.errors import DataError, FinetuneError
from finetune.export.modelfile import parse_modelfile
from finetune.git_history import read_commit
from finetune.io import sha256_file, write_text
from finetune.lineage import MIB, repository_root, without_passwords
from finetune.log import logger, setup_logging
from finetune.tracking.versions import Version, download, find_version, list_files, open_registry, read_text
from finetune.transfer.folder import placing, recorded_hashes, reuse, write_record
from finetune.transfer.hashes import (
    ASK,
    GGUF_NAME,
    MODELFILE,
    TEMPLATE,
    LockedFolder,
    find_folder,
    proven,
    read_lock,
    require_hash,
    tagged_hash,
    tree_hash,
)
from finetune.transfer.limits import require_room, shown_growth
from finetune.transfer.remote import fetch_files

EXAMPLE = "make pull NAME=finetune-smoke@champion, or NAME=finetune-smoke/1"
FOLDER = Path("models/pulled")
# Where the files lie among a run's artifacts, and the out of DVC that holds the GGUF files.
GGUF_ARTIFACTS, OLLAMA_ARTIFACTS, LOCK, METRICS = "gguf", "ollama", "dvc.lock", "metrics/quantize_gguf.json"
GGUF_OUT = "models/gguf"
FROM = re.compile(r"\.\./gguf/(?P<name>model-[A-Z0-9_]{2,16}\.gguf)")


@dataclass(frozen=True)
class Job:
    """A version, the client of its registry, the clone whose DVC is asked, and by which remote ("": its default)."""

    client: Any
    version: Version
    root: Path
    remote: str

    @property
    def title(self) -> str:
        """The version as messages name it."""
        return self.version.title()

    def tag(self, key: str) -> str:
        """A hash among the version's tags; raises DataError where it has none."""
        return tagged_hash(self.version.tags, key, self.title)


def pull(name: str, to: Path | None, quantization: str, remote: str) -> tuple[Version, Path]:
    """Fetch a version into a folder; returns both. One that is there and verifies is left as it is.

    `quantization`: the type of the GGUF, "" for the one that its Modelfile serves. Raises FinetuneError with the remedy
    for whatever is missing, refused, or not what the version's tags say.
    """
    client = open_registry()
    job = Job(client, find_version(client, name, EXAMPLE), repository_root(), remote)
    target = (FOLDER / job.version.model if to is None else to).absolute()
    with placing(target) as partial:
        served = fetch_texts(job, partial)
        wanted = f"model-{quantization}.gguf" if quantization else served
        hashes = known_hashes(job, target, partial)
        if hashes is None:
            hashes = fetch_all(job, partial)
        elif wanted in hashes and not reuse(target, partial, wanted, hashes[wanted]):
            fetch_one(job, partial, wanted)
            require_hash(partial / wanted, hashes[wanted], job.title)
        if wanted not in hashes:
            types = ", ".join(name.removeprefix("model-").removesuffix(".gguf") for name in sorted(hashes))
            raise DataError(f"{job.title} has no {wanted}", "TYPE", f"make pull NAME={name} TYPE= one of {types}")
        for other in partial.glob("*.gguf"):
            if other.name != wanted:
                other.unlink()
        serve_beside(partial / MODELFILE, wanted)
        write_record(partial, model=job.version.model, version=job.version.number, hashes=hashes)
    return job.version, target


def fetch_texts(job: Job, folder: Path) -> str:
    """Write Modelfile and template of the version into `folder`, verified; returns the name of the GGUF in FROM."""
    sizes = list_files(job.client, job.version, OLLAMA_ARTIFACTS)
    if sorted(sizes) != [MODELFILE, TEMPLATE]:
        what = f"{job.title} holds {sorted(sizes)!r:.200} for Ollama, where {MODELFILE} and {TEMPLATE} are expected"
        raise DataError(what, f"artifacts of run {job.version.run_id}: {OLLAMA_ARTIFACTS}", ASK)
    for name in sizes:
        read_text(job.client, job.version, f"{OLLAMA_ARTIFACTS}/{name}", folder)
    found, expected = tree_hash({name: sha256_file(folder / name) for name in sizes}), job.tag("ollama_sha256")
    if found != expected:
        what = f"{MODELFILE} and {TEMPLATE} are not those of {job.title}: SHA-256 {found}, the tag says {expected}"
        raise DataError(what, "tag ollama_sha256", f"pull again; if it comes again, {ASK}")
    if "modelfile_sha256" in job.version.tags:
        require_hash(folder / MODELFILE, job.tag("modelfile_sha256"), job.title)
    return _served_name(folder / MODELFILE)


def _served_name(modelfile: Path) -> str:
    from_path = parse_modelfile(modelfile.read_bytes().decode()).from_path
    named = FROM.fullmatch(from_path)
    if named is None:
        what = f"FROM names {from_path!r:.80}, where this pipeline writes ../gguf/model-TYPE.gguf"
        raise DataError(what, MODELFILE, ASK)
    return named["name"]


def serve_beside(modelfile: Path, gguf_name: str) -> None:
    """Let FROM of a Modelfile of this pipeline name a GGUF in its own folder; nothing else of it changes."""
    text = modelfile.read_bytes().decode()
    before = parse_modelfile(text)
    text = text.replace(f"FROM {before.from_path}\n", f"FROM ./{gguf_name}\n", 1)
    # Ollama takes the last FROM of several.
    if parse_modelfile(text) != replace(before, from_path=f"./{gguf_name}"):
        raise DataError("FROM does not stand alone on one line", MODELFILE, ASK)
    write_text(modelfile, text)


def known_hashes(job: Job, target: Path, partial: Path) -> dict[str, str] | None:
    """SHA-256 of each GGUF of the version by name, proven by its tag; None where only the files themselves tell.

    Looked up in the record of an earlier pull, in the git history here, and among the version's artifacts.
    """
    expected = job.tag("gguf_sha256")
    if found := proven(recorded_hashes(target), expected):
        return found
    # A folder without git has no history to look into.
    recorded = read_commit(job.root, job.version.tags.get("git.commit", "")) if (job.root / ".git").exists() else None
    if recorded and (found := proven({Path(path).name: each for path, each in recorded.expected().items()}, expected)):
        return found
    text = read_text(job.client, job.version, METRICS, partial)
    (partial / Path(METRICS).name).unlink(missing_ok=True)
    return proven(_hashes_in(text), expected) if text else None


def _hashes_in(metrics: str) -> Any:
    try:
        types = json.loads(metrics)["types"]
        return {f"model-{name}.gguf": figures["sha256"] for name, figures in types.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def fetch_one(job: Job, folder: Path, wanted: str) -> None:
    """Write one GGUF into `folder`, not verified: from the registry, or else from DVC's cache or remote."""
    stored = list_files(job.client, job.version, GGUF_ARTIFACTS)
    if wanted in stored:
        from_registry(job, folder, {wanted: stored[wanted]})
    else:
        from_dvc(job, folder, [wanted])


def fetch_all(job: Job, folder: Path) -> dict[str, str]:
    """Write all GGUF files into `folder`; returns their hashes, verified together: that is all the tag tells."""
    stored = list_files(job.client, job.version, GGUF_ARTIFACTS)
    names = {name: size for name, size in stored.items() if GGUF_NAME.fullmatch(name)}
    if names and len(names) == locked_folder(job, folder).files:
        from_registry(job, folder, names)
    else:
        from_dvc(job, folder, [])
    hashes = {file.name: sha256_file(file) for file in sorted(folder.glob("*.gguf"))}
    found, expected = tree_hash(hashes), job.tag("gguf_sha256")
    if found != expected:
        what = f"the GGUF files are not those of {job.title}: SHA-256 {found}, the tag says {expected}"
        raise DataError(what, "tag gguf_sha256", f"pull again; if it comes again, {ASK}")
    return hashes


def from_registry(job: Job, folder: Path, sizes: Mapping[str, int]) -> None:
    """Download GGUF files of these names and sizes from the registry's artifacts."""
    require_room(folder, sum(sizes.values()))
    for name, size_bytes in sizes.items():
        with shown_growth(folder, size_bytes, f"{name} from the registry"):
            download(job.client, job.version, f"{GGUF_ARTIFACTS}/{name}", folder / name, size_bytes)


def from_dvc(job: Job, folder: Path, names: Sequence[str]) -> None:
    """Copy GGUF files (no names: all) out of DVC's cache or remote, by the hashes in the version's dvc.lock."""
    locked = locked_folder(job, folder)
    size = locked.size_bytes
    fetch_files(job.root, locked.md5, names, folder, max_bytes=size, remote=job.remote, title=job.title)


def locked_folder(job: Job, folder: Path) -> LockedFolder:
    """The folder of the GGUF files in the version's dvc.lock, which must be the one of its tag."""
    if read_text(job.client, job.version, LOCK, folder) is None:
        raise DataError(f"{job.title} holds no dvc.lock", f"artifacts of run {job.version.run_id}", ASK)
    stages = read_lock(folder / LOCK, job.tag("dvc_lock_sha256"), job.title)
    (folder / LOCK).unlink()
    return find_folder(stages, GGUF_OUT, job.title)


def describe(version: Version, folder: Path) -> str:
    """What lies in the folder now, with sizes and hashes, and what to type next."""
    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    lines = [f"{version.title()} in {shown}, verified by the registry's tags"]
    for file in sorted(folder.iterdir()):
        lines.append(f"  {file.name:<20} {file.stat().st_size / MIB:>10.1f} MiB  SHA-256 {sha256_file(file)}")
    modelfile = shlex.quote(str(shown / MODELFILE))
    lines += [
        f"ollama create {version.model} -f {modelfile}",
        f"python -m finetune.chat {modelfile}",
        f"python -m finetune.serve {modelfile}",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Pull the version that the arguments name; returns the exit code."""
    parser = argparse.ArgumentParser(prog="make pull", description="fetch and verify a registered version")
    parser.add_argument("name", help="name@alias or name/number, such as finetune-smoke@champion")
    parser.add_argument("--to", type=Path, help="a folder that is new, or that an earlier pull made")
    parser.add_argument(
        "--type", default="", metavar="TYPE", help="such as Q4_K_M; without it, what the Modelfile serves"
    )
    parser.add_argument("--remote", default="", help="a DVC remote other than the default one")
    options = parser.parse_args(arguments)
    setup_logging("pull")
    try:
        version, folder = pull(options.name, options.to, options.type, options.remote)
        sys.stdout.write(describe(version, folder))
    except FinetuneError as error:
        logger.error("%s: %s", type(error).__name__, without_passwords(str(error)))
        return 1
    except KeyboardInterrupt:
        logger.error("stopped; nothing is left half done")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
