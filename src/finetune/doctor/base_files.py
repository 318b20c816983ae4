"""data/base_manifest.json + the Hub cache -> how much of a Hub base is there already. No network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data_sections import HubBase
from finetune.io import read_json

MANIFEST = Path("data/base_manifest.json")


@dataclass(frozen=True)
class BaseFiles:
    """`missing_bytes`: still to download, None where no manifest says it. `weight_bytes`: in the Hub cache, or None."""

    missing_bytes: int | None
    weight_bytes: int | None

    @property
    def fetched(self) -> bool:
        """Whether everything that the manifest lists is there."""
        return self.missing_bytes == 0


def look(root: Path, base: HubBase) -> BaseFiles:
    """What of the base is in the Hub cache, at the revision of params.yaml."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(base.repo_id, "config.json", revision=base.revision)
    snapshot = Path(found).parent if isinstance(found, str) else None
    weights = sum(file.stat().st_size for file in snapshot.glob("*.safetensors")) if snapshot else 0
    manifest = read_json(root / MANIFEST) if (root / MANIFEST).is_file() else {}
    return BaseFiles(missing_bytes(manifest, base, snapshot), weights or None)


def missing_bytes(manifest: dict[str, Any], base: HubBase, snapshot: Path | None) -> int | None:
    """Bytes of the manifest's files that `snapshot` lacks; None where the manifest is of another base or revision."""
    if (manifest.get("repo_id"), manifest.get("revision")) != (base.repo_id, base.revision):
        return None
    return sum(
        int(file["size_bytes"])
        for file in manifest["files"]
        if snapshot is None or not (snapshot / file["path"]).is_file()
    )
