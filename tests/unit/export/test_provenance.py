"""The metadata that a GGUF carries: literal, complete, and free of whatever differs from machine to machine."""

from __future__ import annotations

import copy
import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from finetune.export.provenance import SECTIONS, canonical_params, describe_model, source_sha256
from finetune.io import write_json
from finetune.lineage import read_datasets
from finetune.params import load_params, section

SMOKE = Path(__file__).parents[3] / "recipes/smoke/params.yaml"
REVISION = "0123456789abcdef0123456789abcdef01234567"
SOURCES: list[dict[str, Any]] = [
    {
        "name": "chats",
        "use": "training",
        "format": "chatml",
        "license": "MIT",
        "origin": "local:chats.chatml",
        "revision": None,
        "files": [{"path": "chats/a.chatml", "sha256": "aa", "size_bytes": 10}],
        "streamed": None,
    },
    {
        "name": "oasst",
        "use": "training",
        "format": "message_tree",
        "license": "Apache-2.0",
        "origin": "hub:OpenAssistant/oasst1/data/*.parquet",
        "revision": REVISION,
        "files": [
            {"path": "oasst/b", "sha256": "bb", "size_bytes": 20},
            {"path": "oasst/a", "sha256": "cc", "size_bytes": 30},
        ],
        "streamed": None,
    },
    {
        "name": "benchmark",
        "use": "decontamination",
        "format": "text",
        "license": "CC-BY-NC-4.0",
        "origin": "local:benchmark.txt",
        "revision": None,
        "files": [{"path": "benchmark/c", "sha256": "dd", "size_bytes": 40}],
        "streamed": None,
    },
]
HUB_BASE = {"kind": "hub", "repo_id": "Qwen/Qwen2.5-0.5B", "revision": REVISION, "files": []}


def sections() -> dict[str, Any]:
    params = load_params(SMOKE)
    return {name: section(params, name) for name in SECTIONS}


def describe(folder: Path, base: dict[str, Any]) -> dict[str, Any]:
    merged, adapter = folder / "merged", folder / "adapter"
    for path in (merged, adapter):
        path.mkdir(exist_ok=True)
        (path / "model.safetensors").write_bytes(path.name.encode())
    (merged / "chat_template.jinja").write_text("{{ messages }}")
    write_json(folder / "base.json", base)
    write_json(folder / "manifest.json", {"sources": SOURCES})
    return describe_model(merged, adapter, folder / "base.json", folder / "manifest.json", sections())


def test_each_key_says_one_thing(tmp_path: Path) -> None:
    keys = describe(tmp_path, HUB_BASE)
    expected = {
        "general.finetune": "smoke",
        "general.license": "Apache-2.0 AND MIT",
        "general.base_model.count": 1,
        "general.base_model.0.name": "Qwen2.5-0.5B",
        "general.base_model.0.organization": "Qwen",
        "general.base_model.0.version": REVISION,
        "general.base_model.0.repo_url": "https://huggingface.co/Qwen/Qwen2.5-0.5B",
        "general.dataset.count": 2,
        "general.dataset.0.name": "chats",
        "general.dataset.0.version": source_sha256(SOURCES[0]),
        "general.dataset.1.name": "oasst1",
        "general.dataset.1.organization": "OpenAssistant",
        "general.dataset.1.version": REVISION,
        "general.dataset.1.repo_url": "https://huggingface.co/datasets/OpenAssistant/oasst1",
        "finetune.recipe": "smoke",
        "finetune.base.kind": "hub",
        "finetune.base.repo": "Qwen/Qwen2.5-0.5B",
        "finetune.base.revision": REVISION,
        "finetune.data_sha256": hashlib.sha256((tmp_path / "manifest.json").read_bytes()).hexdigest(),
        "finetune.chat_template_sha256": hashlib.sha256(b"{{ messages }}").hexdigest(),
        "finetune.package.torch": version("torch").split("+")[0],
        "finetune.package.llama-cpp-python": "0.3.36",
        "finetune.trace": "in the repository that made this file: make lineage FILE=<this file>",
    }
    assert {key: keys[key] for key in expected} == expected
    others = {"finetune.params", "finetune.data_sources", "finetune.adapter_sha256", "finetune.merged_sha256"}
    packages = {key for key in keys if key.startswith("finetune.package.")}
    assert set(keys) == expected.keys() | others | packages
    assert len(packages) == 8
    assert keys["finetune.adapter_sha256"] != keys["finetune.merged_sha256"]
    assert json.loads(keys["finetune.data_sources"])[1] == {
        "name": "oasst",
        "use": "training",
        "license": "Apache-2.0",
        "origin": "hub:OpenAssistant/oasst1/data/*.parquet",
        "revision": REVISION,
        "files": 2,
        "size_bytes": 50,
        "sha256": source_sha256(SOURCES[1]),
    }


def test_a_base_made_from_scratch_names_no_base_model(tmp_path: Path) -> None:
    keys = describe(tmp_path, {"kind": "scratch"})
    assert keys["finetune.base.kind"] == "scratch"
    assert not [key for key in keys if "base_model" in key or key.startswith("finetune.base.r")]


def test_equal_models_in_other_places_have_equal_keys(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "elsewhere"]
    for folder in folders:
        folder.mkdir()
    one, other = (describe(folder, HUB_BASE) for folder in folders)
    assert one == other
    assert str(tmp_path) not in json.dumps(one)
    (folders[1] / "adapter" / "model.safetensors").write_bytes(b"other")
    assert describe(folders[1], HUB_BASE) == one  # describe() writes it again
    (folders[1] / "merged" / "more").write_bytes(b"other")
    assert describe(folders[1], HUB_BASE)["finetune.merged_sha256"] != one["finetune.merged_sha256"]


def test_params_hold_what_made_the_model_and_no_folder_of_a_machine() -> None:
    held = json.loads(canonical_params(sections()))
    assert sorted(held) == sorted(SECTIONS)
    assert held["seed"] == 42
    assert held["train_qlora"]["lora"]["rank"] == 32
    assert "local_dir" not in held["fetch"]
    assert held["quantize_gguf"] == {"importance_matrix_rows": None}


@pytest.mark.parametrize(("path", "changes"), [(("train_qlora", "epochs"), True), (("fetch", "local_dir"), False)])
def test_only_what_can_change_the_model_changes_the_params(path: tuple[str, str], changes: bool) -> None:
    values = {
        name: value.model_dump(mode="json") if hasattr(value, "model_dump") else value
        for name, value in sections().items()
    }
    other = copy.deepcopy(values)
    other[path[0]][path[1]] = 9
    assert (canonical_params(other) != canonical_params(values)) is changes


def test_a_source_has_the_hash_that_the_registry_shows(tmp_path: Path) -> None:
    write_json(tmp_path / "manifest.json", {"sources": SOURCES})
    assert [facts.sha256 for facts in read_datasets(tmp_path / "manifest.json")] == [
        source_sha256(source) for source in SOURCES
    ]
