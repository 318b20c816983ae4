"""The sources and the base model that params.yaml names -> data/raw with a manifest, and the base manifest.

All is found, and tried for access and room, before anything is downloaded. Downloads stay in a folder beside
`data/raw` until all are there: DVC empties `data/raw` before a second try, which goes on where the first one ended.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from finetune.data.fetching.fetch_plan import Plan, SourcePlan, check_room, plan
from finetune.data.fetching.hub import allow_network
from finetune.data.fetching.hub_download import download, place, raw_file
from finetune.data.fetching.hub_stream import stream
from finetune.data.fetching.sources import MANIFEST, RawFile, copy_verified, manifest_entry, sizes
from finetune.data_sections import Fetch, HubBase
from finetune.io import fresh_folder, sha256_file, write_json
from finetune.log import logger
from finetune.runtime import caller_is_offline
from finetune.source_sections import HubOrigin, HubStreamOrigin, LocalOrigin
from finetune.stages._main import stage_main

PARAMS = ("fetch",)


def run(raw: Path, base_manifest: Path, metrics: Path, *, fetch: Fetch) -> None:
    """Copy, download or stream every source, and the base model; the only stage that may use the network."""
    if isinstance(fetch.base_model, HubBase) or any(not isinstance(s.origin, LocalOrigin) for s in fetch.sources):
        allow_network()
    staging = raw.with_name(f".{raw.name}.partial")
    planned = plan(fetch)
    check_room(planned, raw, staging)
    # What a lost connection must not cost comes first: these files are kept, a stream starts again.
    base = _base(planned)
    downloaded = [_downloaded(entry, staging / entry.source.name) for entry in planned.sources]
    fresh_folder(raw)
    entries = [_entry(*pair, Path(fetch.local_dir), raw) for pair in zip(planned.sources, downloaded, strict=True)]
    write_json(raw / MANIFEST, {"sources": entries})
    write_json(base_manifest, base)
    shutil.rmtree(staging, ignore_errors=True)
    numbers = sizes(entries, base)
    write_json(metrics, numbers)
    logger.info("%(sources)d sources, %(files)d files, %(size_bytes)d bytes", numbers)
    logger.info("base model %s: %d files, %d bytes", base["kind"], numbers["base_files"], numbers["base_size_bytes"])


def _base(planned: Plan) -> dict[str, Any]:
    if (repo := planned.base) is None:
        return {"kind": "scratch"}
    rows = [raw_file(file.path, download(repo, file, None), file).to_row() for file in planned.base_files]
    return {"kind": "hub", "repo_id": repo.repo_id, "revision": repo.revision, "files": rows}


def _downloaded(entry: SourcePlan, folder: Path) -> list[Path]:
    """The files of a Hub source, below `folder`, or offline in the Hub cache; none for another source."""
    if entry.repo is None or not isinstance(entry.source.origin, HubOrigin):
        return []
    return [download(entry.repo, file, None if caller_is_offline() else folder) for file in entry.files]


def _entry(entry: SourcePlan, downloaded: list[Path], local_dir: Path, raw: Path) -> dict[str, Any]:
    name, origin = entry.source.name, entry.source.origin
    (raw / name).mkdir()
    streamed = None
    if isinstance(origin, HubStreamOrigin) and entry.repo is not None:
        target = raw / name / "stream.jsonl"
        streamed = stream(entry.repo, list(entry.files), origin, target).to_row()
        files = [RawFile(f"{name}/{target.name}", sha256_file(target), target.stat().st_size)]
    elif entry.repo is not None:
        pairs = zip(downloaded, entry.files, strict=True)
        files = [place(entry.repo, file, path, raw, f"{name}/{file.path}") for path, file in pairs]
    else:
        files = [copy_verified(path, raw, f"{name}/{path.relative_to(local_dir).as_posix()}") for path in entry.local]
    return manifest_entry(entry.source, files, streamed)


if __name__ == "__main__":
    stage_main(run, PARAMS)
