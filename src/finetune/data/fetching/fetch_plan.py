"""The fetch section -> every file to read, before any is read: the faults of all sources together, and room for all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from finetune.data.fetching.hub import HubFile, HubUnreachableError, Repo, matching, raise_together, readable_files
from finetune.data.fetching.hub_download import MODEL_FILES, cached_files, is_complete, model_files
from finetune.data.fetching.hub_stream import check_streamable
from finetune.data.fetching.sources import local_files
from finetune.data_sections import Fetch, HubBase
from finetune.errors import DataError
from finetune.runtime import caller_is_offline
from finetune.source_sections import HubStreamOrigin, LocalOrigin, Source

Found = TypeVar("Found")
GB = 1e9


@dataclass(frozen=True)
class SourcePlan:
    """A source and its files: `local` below fetch.local_dir, or `files` of `repo`."""

    source: Source
    local: tuple[Path, ...]
    repo: Repo | None
    files: tuple[HubFile, ...]


@dataclass(frozen=True)
class Plan:
    """All sources in order, and the files of the base model (none for a scratch one)."""

    sources: tuple[SourcePlan, ...]
    base: Repo | None
    base_files: tuple[HubFile, ...]


def plan(fetch: Fetch) -> Plan:
    """Find every file, and try whether it may be read; downloads nothing.

    Raises one DataError with the faults of all sources, or HubUnreachableError as soon as the Hub does not answer.
    """
    faults: list[DataError] = []

    def attempt(find: Callable[[], Found]) -> Found | None:
        try:
            return find()
        except HubUnreachableError:
            raise
        except DataError as fault:
            faults.append(fault)
            return None

    sources = [attempt(partial(_plan_source, source, Path(fetch.local_dir))) for source in fetch.sources]
    base, base_files = None, None
    if isinstance(fetch.base_model, HubBase):
        base = Repo(fetch.base_model.repo_id, "model", fetch.base_model.revision)
        base_files = attempt(partial(_plan_base, base))
    raise_together(faults, "nothing was downloaded: mend them, then run `dvc repro`")
    return Plan(tuple(found for found in sources if found), base, tuple(base_files or ()))


def check_room(planned: Plan, raw: Path, staging: Path) -> None:
    """Raises DataError when a disk has too little room for what is still to be downloaded or copied."""
    needs: dict[Path, int] = {raw.parent: 0}
    for entry in planned.sources:
        needs[raw.parent] += sum(path.stat().st_size for path in entry.local) + _to_come(entry, staging)
    if planned.base is not None:
        from huggingface_hub import constants

        missing = [file for file in planned.base_files if not is_complete(planned.base, file, None)]
        needs[Path(constants.HF_HUB_CACHE)] = sum(file.size_bytes for file in missing)
    by_disk: dict[int, tuple[Path, int]] = {}
    for folder, size_bytes in needs.items():
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        first, before = by_disk.get(there.stat().st_dev, (there, 0))
        by_disk[there.stat().st_dev] = (first, before + size_bytes)
    for folder, size_bytes in by_disk.values():
        free_bytes = shutil.disk_usage(folder).free
        if size_bytes > free_bytes:
            raise DataError(
                f"{size_bytes / GB:.3f} GB are to be read, and the disk has {free_bytes / GB:.3f} GB free",
                folder,
                "free some, or set HF_HOME (base model) or the repository's place (data) to a larger disk",
            )


def _to_come(entry: SourcePlan, staging: Path) -> int:
    if isinstance(entry.source.origin, HubStreamOrigin):
        # A budget in rows alone says nothing of bytes.
        return entry.source.origin.max_bytes or 0
    if entry.repo is None:
        return 0
    folder = staging / entry.source.name
    return sum(file.size_bytes for file in entry.files if not is_complete(entry.repo, file, folder))


def _plan_source(source: Source, local_dir: Path) -> SourcePlan:
    origin = source.origin
    if isinstance(origin, LocalOrigin):
        return SourcePlan(source, tuple(local_files(local_dir, origin.files, source.name)), None, ())
    repo = Repo(origin.repo_id, "dataset", origin.revision)
    if isinstance(origin, HubStreamOrigin):
        files = readable_files(repo, (origin.files,))
        check_streamable(repo, files)
    else:
        files = (
            matching(repo, cached_files(repo), (origin.files,))
            if caller_is_offline()
            else readable_files(repo, (origin.files,))
        )
    return SourcePlan(source, (), repo, tuple(files))


def _plan_base(repo: Repo) -> list[HubFile]:
    return model_files(repo, cached_files(repo) if caller_is_offline() else readable_files(repo, MODEL_FILES))
