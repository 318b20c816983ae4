"""merged model, adapter, manifests and params -> GGUF metadata that says where a file came from, wherever it is found.

`general.*` keys are those of the GGUF specification, which registries and viewers show
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md); `finetune.*` keys are named as the tags of a registered
version. Nothing here depends on the machine, the time or the git commit: equal models give equal bytes, and the commit
that made a file is the one whose metrics/quantize_gguf.json holds its SHA-256 (`make lineage FILE=...`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from finetune.chat_template import SERVING_TEMPLATE
from finetune.io import read_json, sha256_file, sha256_text, sha256_tree

# The sections of params.yaml that a GGUF's bytes depend on. Budgets of quantize_gguf can only refuse a file.
SECTIONS = (
    "recipe", "seed", "cpu_threads", "fetch", "clean", "tokenizer", "base", "tokenize", "split", "train_qlora",
    "merge", "quantize_gguf",
)  # fmt: skip
PREFIX = "finetune."
PACKAGES = ("bitsandbytes", "datasets", "llama-cpp-python", "peft", "tokenizers", "torch", "transformers", "trl")
HUB = "https://huggingface.co/"
TRACE = "in the repository that made this file: make lineage FILE=<this file>"


def licence_of_all(names: Sequence[str]) -> str:
    """The SPDX expression of works under all of these licences; a choice between two keeps its own brackets."""
    return " AND ".join(f"({name})" if " OR " in name else name for name in sorted(set(names)))


def describe_model(
    merged: Path, adapter: Path, base_manifest: Path, raw_manifest: Path, sections: Mapping[str, Any]
) -> dict[str, str | int | bool | list[str]]:
    """GGUF metadata of everything made from `merged`; `sections`: the values of SECTIONS, pydantic models or scalars.

    Reads and hashes the adapter and the merged model. `general.license` is an SPDX expression over the sources that
    the adapter was trained on, as params.yaml names their licences; the base model's own is not recorded there.
    """
    base, sources = read_json(base_manifest), read_json(raw_manifest)["sources"]
    trained = [source for source in sources if source["use"] == "training"]
    recipe = str(sections["recipe"])
    return {
        "general.finetune": recipe,
        "general.license": licence_of_all([source["license"] for source in trained]),
        **_base_keys(base),
        **_dataset_keys(trained),
        f"{PREFIX}recipe": recipe,
        f"{PREFIX}params": canonical_params(sections),
        f"{PREFIX}data_sha256": sha256_file(raw_manifest),
        f"{PREFIX}data_sources": _json([_source_row(source) for source in sources]),
        f"{PREFIX}base.kind": base["kind"],
        f"{PREFIX}adapter_sha256": sha256_tree(adapter),
        f"{PREFIX}merged_sha256": sha256_tree(merged),
        f"{PREFIX}chat_template_sha256": sha256_file(merged / SERVING_TEMPLATE),
        # Without the build (+cpu, +cu130), which does not change a result on the same device.
        **{f"{PREFIX}package.{name}": version(name).partition("+")[0] for name in PACKAGES},
        f"{PREFIX}trace": TRACE,
    }


def canonical_params(sections: Mapping[str, Any]) -> str:
    """What the model was made by, as JSON with sorted keys; without the local folder, which is a machine's."""
    values = {
        name: value.model_dump(mode="json") if isinstance(value, BaseModel) else value
        for name, value in sections.items()
    }
    values["fetch"] = {key: value for key, value in values["fetch"].items() if key != "local_dir"}
    quantization = values.pop("quantize_gguf")
    return _json({**values, "quantize_gguf": {"importance_matrix_rows": quantization["importance_matrix_rows"]}})


def source_sha256(source: Mapping[str, Any]) -> str:
    """SHA-256 over the names and hashes of the files of a source in data/raw/manifest.json, as the registry has it."""
    files = sorted((file["path"], file["sha256"]) for file in source["files"])
    return sha256_text(json.dumps(files, ensure_ascii=False))


def _source_row(source: Mapping[str, Any]) -> dict[str, Any]:
    row = {key: source[key] for key in ("name", "use", "license", "origin", "revision")}
    size_bytes = sum(file["size_bytes"] for file in source["files"])
    return {**row, "files": len(source["files"]), "size_bytes": size_bytes, "sha256": source_sha256(source)}


def _base_keys(base: Mapping[str, Any]) -> dict[str, str | int]:
    if base["kind"] != "hub":
        return {}
    return {
        "general.base_model.count": 1,
        **_repository("general.base_model.0", base["repo_id"], base["revision"]),
        f"{PREFIX}base.repo": base["repo_id"],
        f"{PREFIX}base.revision": base["revision"],
    }


def _dataset_keys(sources: Sequence[Mapping[str, Any]]) -> dict[str, str | int]:
    keys: dict[str, str | int] = {"general.dataset.count": len(sources)}
    for number, source in enumerate(sources):
        kind, _, place = source["origin"].partition(":")
        prefix = f"general.dataset.{number}"
        if kind == "local":
            keys |= {f"{prefix}.name": source["name"], f"{prefix}.version": source_sha256(source)}
        else:
            repo_id = "/".join(place.split("/")[:2])
            keys |= _repository(prefix, repo_id, source["revision"], kind="datasets/")
    return keys


def _repository(prefix: str, repo_id: str, revision: str, kind: str = "") -> dict[str, str]:
    owner, _, name = repo_id.rpartition("/")
    organization = {f"{prefix}.organization": owner} if owner else {}
    return {f"{prefix}.name": name, f"{prefix}.version": revision, **organization} | {
        f"{prefix}.repo_url": f"{HUB}{kind}{repo_id}"
    }


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
