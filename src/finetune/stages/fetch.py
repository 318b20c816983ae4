"""The sources and the base model that params.yaml names -> data/raw with a manifest, and the base manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.data.hub import Repo, allow_network, download, download_model
from finetune.data.sources import MANIFEST, RawFile, copy_verified, local_files, manifest_entry
from finetune.data_sections import ChatSource, CsvSource, Fetch, HubBase, HubOrigin, ScratchBase
from finetune.io import fresh_folder, write_json
from finetune.log import logger, progress
from finetune.stages._main import stage_main

PARAMS = ("fetch",)


def run(raw: Path, base_manifest: Path, metrics: Path, *, fetch: Fetch) -> None:
    """Copy or download every source, then the base model; the only stage that may use the network."""
    fresh_folder(raw)
    local_dir = Path(fetch.local_dir)
    entries = []
    for source in progress(fetch.sources, len(fetch.sources), "source", "fetch"):
        entries.append(manifest_entry(source, _files_of(source, local_dir, raw)))
    write_json(raw / MANIFEST, {"sources": entries})
    base = _base(fetch.base_model)
    write_json(base_manifest, base)
    sizes = {entry["name"]: sum(file["size_bytes"] for file in entry["files"]) for entry in entries}
    numbers = {
        "sources": len(entries),
        "files": sum(len(entry["files"]) for entry in entries),
        "size_bytes": sum(sizes.values()),
        "size_bytes_by_source": sizes,
        "base_files": len(base.get("files", [])),
        "base_size_bytes": sum(file["size_bytes"] for file in base.get("files", [])),
    }
    write_json(metrics, numbers)
    logger.info(
        "%d sources, %d files, %d bytes; base model %s: %d files, %d bytes",
        numbers["sources"],
        numbers["files"],
        numbers["size_bytes"],
        base["kind"],
        numbers["base_files"],
        numbers["base_size_bytes"],
    )


def _files_of(source: ChatSource | CsvSource, local_dir: Path, raw: Path) -> list[RawFile]:
    origin = source.origin
    if isinstance(origin, HubOrigin):
        allow_network()
        found = download(Repo(origin.repo_id, "dataset", origin.revision), origin.files)
    else:
        paths = local_files(local_dir, origin.files, source.name)
        found = [(path.relative_to(local_dir).as_posix(), path) for path in paths]
    return [copy_verified(path, raw, f"{source.name}/{name}") for name, path in found]


def _base(base_model: ScratchBase | HubBase) -> dict[str, Any]:
    if isinstance(base_model, ScratchBase):
        return {"kind": "scratch"}
    allow_network()
    files = download_model(Repo(base_model.repo_id, "model", base_model.revision))
    return {
        "kind": "hub",
        "repo_id": base_model.repo_id,
        "revision": base_model.revision,
        "files": [file.to_row() for file in files],
    }


if __name__ == "__main__":
    stage_main(run, PARAMS)
