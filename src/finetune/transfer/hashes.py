"""Tags of a version, files and lists of hashes -> whether they belong together; what others wrote is not believed.

The tags `gguf_sha256` and `ollama_sha256` are hashes over all files of a folder (finetune.io.sha256_tree). A list of
the hashes of the single files is proven by the tag, so that one GGUF of several can be checked alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent

from finetune.errors import DataError
from finetune.io import sha256_file
from finetune.lineage import lock_sha256

SHA256 = re.compile(r"[0-9a-f]{64}")
FOLDER_MD5 = re.compile(r"[0-9a-f]{32}\.dir")
FILE_MD5 = re.compile(r"[0-9a-f]{32}")
GGUF_NAME = re.compile(r"model-(?P<type>[A-Z0-9_]{2,16})\.gguf")
MODELFILE, TEMPLATE = "Modelfile", "template.gotmpl"
ASK = "ask who registered it, and pull no version that does not verify"


def tree_hash(hashes: Mapping[str, str]) -> str:
    """`sha256_tree` of a folder without folders in it, from the SHA-256 of its files by name."""
    lines = "".join(f"{name}\0{digest}\n" for name, digest in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def tagged_hash(tags: Mapping[str, str], key: str, title: str) -> str:
    """A hash among the tags; raises DataError for a version that has none."""
    digest = tags.get(key, "")
    if not SHA256.fullmatch(digest):
        what = f"{title} has no tag {key} that is a SHA-256, so nothing of it can be verified"
        raise DataError(what, f"tag {key}: {digest!r:.80}", "pull a version that this pipeline registered")
    return digest


def proven(listed: Any, expected: str) -> dict[str, str] | None:
    """`listed` as {name of a GGUF: SHA-256} if it is such a list and the hash over it is `expected`, else None."""
    if not isinstance(listed, dict) or not all(isinstance(text, str) for pair in listed.items() for text in pair):
        return None
    well_formed = all(GGUF_NAME.fullmatch(name) and SHA256.fullmatch(digest) for name, digest in listed.items())
    return dict(listed) if well_formed and tree_hash(listed) == expected else None


def require_hash(path: Path, expected: str, title: str) -> None:
    """Raise DataError unless the file has this SHA-256."""
    if (found := sha256_file(path)) != expected:
        what = f"{path.name} is not the file of {title}: SHA-256 {found}, the version's is {expected}"
        raise DataError(what, path.name, f"pull again; if it comes again, {ASK}")


@dataclass(frozen=True)
class LockedFolder:
    """A folder among the outs of a dvc.lock: DVC's hash of it, and how large it is."""

    md5: str
    size_bytes: int
    files: int


def find_folder(stages: Mapping[str, Any], out: str, title: str) -> LockedFolder:
    """The folder `out` of a version's `read_lock`; raises DataError where it names none."""
    for stage in stages.values():
        for entry in stage.get("outs", []):
            numbers = (entry.get("size"), entry.get("nfiles"))
            if entry.get("path") == out and FOLDER_MD5.fullmatch(str(entry.get("md5"))) and _are_counts(numbers):
                return LockedFolder(entry["md5"], *numbers)
    raise DataError(f"dvc.lock of {title} names no folder {out}", "dvc.lock", ASK)


def _are_counts(numbers: tuple[Any, ...]) -> bool:
    return all(type(number) is int and number >= 0 for number in numbers)


def read_lock(lock_file: Path, expected: str, title: str) -> dict[str, Any]:
    """The stages of a version's dvc.lock; raises DataError where it is none, or not that of the version's tag."""
    try:
        # An alias can stand for itself a billion times over; DVC writes none.
        text = lock_file.read_bytes().decode("utf-8")
        if any(isinstance(event, AliasEvent) for event in YAML(typ="safe", pure=True).parse(text)):
            raise DataError(f"dvc.lock of {title} holds YAML aliases, which DVC does not write", "dvc.lock", ASK)
        found = lock_sha256(lock_file)
        stages: dict[str, Any] = YAML(typ="safe", pure=True).load(text)["stages"]
    except (YAMLError, KeyError, TypeError, AttributeError, UnicodeDecodeError, RecursionError) as fault:
        raise DataError(f"dvc.lock of {title} cannot be read: {type(fault).__name__}", "dvc.lock", ASK) from None
    if not _are_stages(stages):
        raise DataError(f"dvc.lock of {title} holds something else than stages with paths and hashes", "dvc.lock", ASK)
    if found != expected:
        raise DataError(
            f"dvc.lock of {title} is not the one in its tags: {found}, not {expected}", "tag dvc_lock_sha256", ASK
        )
    return stages


def _are_stages(stages: Any) -> bool:
    """Whether every stage has a command, entries with text paths and hashes, and parameters by file."""
    if not isinstance(stages, dict) or not all(isinstance(stage, dict) for stage in stages.values()):
        return False
    lists = [stage.get(key, []) for stage in stages.values() for key in ("deps", "outs")]
    files = [stage.get("params", {}) for stage in stages.values()]
    if not all(isinstance(entries, list) for entries in lists) or not all(isinstance(each, dict) for each in files):
        return False
    entries = [entry for listed in lists for entry in listed]
    return (
        all(isinstance(stage.get("cmd"), str) for stage in stages.values())
        and all(isinstance(values, dict) for named in files for values in named.values())
        and all(isinstance(entry, dict) for entry in entries)
        and all(isinstance(entry.get("path"), str) and isinstance(entry.get("md5", ""), str) for entry in entries)
    )


def parse_folder(content: bytes, folder_md5: str) -> dict[str, str] | None:
    """Name -> MD5 of the GGUF files in DVC's list of a folder; None where it is not the list of this hash."""
    try:
        entries = {entry["relpath"]: entry["md5"] for entry in json.loads(content)}
        sound = all(GGUF_NAME.fullmatch(name) and FILE_MD5.fullmatch(digest) for name, digest in entries.items())
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    whole = hashlib.md5(content, usedforsecurity=False).hexdigest() == folder_md5.removesuffix(".dir")
    return entries if sound and whole else None
