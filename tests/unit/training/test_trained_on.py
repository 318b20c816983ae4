from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from finetune.errors import DataError
from finetune.io import read_json, sha256_file, sha256_tree, write_json
from finetune.training.method import save_trained
from finetune.training.model import load_base
from finetune.training.trained_on import describe, describe_base, read_trained_on, to_device_with_room
from finetune.training_sections import Quantization

CPU = torch.device("cpu")
LAYERS = [
    f"model.layers.0.{name}"
    for name in (
        "mlp.down_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "self_attn.k_proj",
        "self_attn.o_proj",
        "self_attn.q_proj",
        "self_attn.v_proj",
    )
]


def adapter_of(base: Path, folder: Path, quantization: Quantization | None) -> Path:
    model = load_base(base, quantization, torch.float32, CPU)
    trained_on = describe(base, model)
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    save_trained(adapted, trained_on, folder)
    return folder


@pytest.mark.parametrize("which", ["tiny_base", "untied_base"])
def test_the_layers_that_were_four_bit_are_named_and_the_output_layer_is_none(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    base = request.getfixturevalue(which)
    adapter = adapter_of(base, tmp_path / "a", Quantization(format="fp4", double_quantization=False))
    assert read_trained_on(adapter, base) == {
        "layers": LAYERS,
        "kind": "fp4",
        "double_quantization": False,
        "blocksize": 64,
        "storage": "uint8",
        "dtype": "float32",
    }
    adapter_of(base, tmp_path / "b", Quantization(format="fp4", double_quantization=False))
    assert sha256_tree(tmp_path / "a") == sha256_tree(tmp_path / "b")


def test_a_base_of_sixteen_bit_has_no_four_bit_layers(tiny_base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(tiny_base, tmp_path / "adapter", Quantization(format="none", double_quantization=False))
    assert read_trained_on(adapter, tiny_base) is None
    assert read_json(adapter / "trained_on.json")["base"] == {
        "repo_id": None,
        "revision": None,
        "files": {name: sha256_file(tiny_base / name) for name in ("config.json", "model.safetensors")},
    }


def test_another_base_is_refused(tiny_base: Path, untied_base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(tiny_base, tmp_path / "adapter", None)
    with pytest.raises(
        DataError, match=r"another base than this one; they differ in: config\.json, model\.safetensors"
    ):
        read_trained_on(adapter, untied_base)
    changed = tmp_path / "changed"
    shutil.copytree(tiny_base, changed)
    content = bytearray((changed / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (changed / "model.safetensors").write_bytes(content)
    with pytest.raises(DataError, match=r"they differ in: model\.safetensors\n"):
        read_trained_on(adapter, changed)
    shutil.copyfile(tiny_base / "model.safetensors", changed / "model-2.safetensors")
    shutil.copyfile(tiny_base / "model.safetensors", changed / "model.safetensors")
    with pytest.raises(DataError, match=r"they differ in: model-2\.safetensors\n"):
        read_trained_on(adapter, changed)


def test_another_revision_of_a_hub_base_is_refused_and_its_readme_is_none_of_it(tmp_path: Path) -> None:
    files = [{"path": "model.safetensors", "sha256": "ab" * 32, "size_bytes": 1}]
    manifest = {"kind": "hub", "repo_id": "someone/tiny", "revision": "01" * 20, "files": files}
    readme = {"path": "README.md", "sha256": "cd" * 32, "size_bytes": 1}
    for name, content in (
        ("one", manifest),
        ("same", {**manifest, "files": [*files, readme]}),
        ("later", {**manifest, "revision": "23" * 20}),
        ("fork", {**manifest, "repo_id": "another/tiny"}),
    ):
        write_json(tmp_path / name / "base.json", content)
    adapter = tmp_path / "adapter"
    write_json(adapter / "trained_on.json", {"base": describe_base(tmp_path / "one"), "four_bit": None})
    assert read_trained_on(adapter, tmp_path / "same") is None
    with pytest.raises(DataError, match=rf"differ in: revision \({'01' * 20}, here {'23' * 20}\)"):
        read_trained_on(adapter, tmp_path / "later")
    with pytest.raises(DataError, match=r"differ in: repo_id \(someone/tiny, here another/tiny\)"):
        read_trained_on(adapter, tmp_path / "fork")


def test_an_adapter_that_names_no_base_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not say which base it was trained on(.|\n)*single-item train_qlora"):
        read_trained_on(tmp_path, tiny_base)


def test_a_model_stays_on_the_cpu_where_no_other_device_is() -> None:
    model = torch.nn.Linear(2, 2)
    assert to_device_with_room(model, CPU) is model
