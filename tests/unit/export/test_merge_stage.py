"""The merge stage on tiny models: both ways to merge beside the model as it was trained, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file
from training_settings import make_lora
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from finetune.errors import DataError, ExportError
from finetune.export.four_bit import ways_to_merge
from finetune.export.merge import each_way, merge_shards, reload
from finetune.io import read_json, sha256_tree, write_json
from finetune.sections import Merge
from finetune.stages.merge import run
from finetune.training.method import load_trained, save_trained
from finetune.training.model import add_adapter, load_base
from finetune.training.trained_on import describe, read_trained_on
from finetune.training.vocabulary import Extension
from finetune.training_sections import Quantization

CPU = torch.device("cpu")
KEPT = Extension((), 0)
NF4 = Quantization(format="nf4", double_quantization=True)
PROBE = torch.tensor([[1, 5, 6, 7, 8, 9, 2, 28, 3]])
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"


def make_adapter(base: Path, folder: Path, quantization: Quantization, **options: Any) -> Path:
    """An adapter with weights that are not zero, as the training stage leaves them."""
    torch.manual_seed(1)
    plain = {"use_dora": False, "use_rslora": False, "target_modules": ["q_proj", "down_proj"], **options}
    model = load_base(base, quantization, torch.float32, CPU)
    trained_on = describe(base, model)
    model = add_adapter(model, make_lora(**plain), KEPT)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    save_trained(model, trained_on, folder)
    return folder


@pytest.fixture
def inputs(tiny_tokenizer: Any, tmp_path: Path) -> dict[str, Path]:
    """A tokenizer and test rows, of which two have a trained token to predict."""
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer/chat_template.jinja").write_text(TEMPLATE)
    rows = [
        {"id": "b", "source": "x", "input_ids": [1, 5, 6, 7, 2], "trained": [False, False, True, True, True]},
        {"id": "a", "source": "y", "input_ids": [1, 9, 8, 2], "trained": [False, True, True, True]},
        {"id": "0", "source": "y", "input_ids": [1, 3], "trained": [True, False]},
    ]
    (tmp_path / "split").mkdir()
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "split/test.parquet")
    return {"tokenizer": tmp_path / "tokenizer", "split": tmp_path / "split", "folder": tmp_path}


def settings(**changes: Any) -> Merge:
    plain = {"onto": "original", "dtype": "float32", "compare_dtype": "float32", "max_logit_difference": 1e-4}
    return Merge(**{**plain, "compare_rows": 8, **changes})


def merge(base: Path, adapter: Path, inputs: dict[str, Path], name: str, **changes: Any) -> dict[str, Any]:
    folder = inputs["folder"] / name
    paths = (adapter, base, inputs["tokenizer"], inputs["split"], folder / "merged", folder / "merge.json")
    run(*paths, seed=1, cpu_threads=2, merge=settings(**changes))
    numbers: dict[str, Any] = read_json(folder / "merge.json")
    return numbers


@pytest.mark.parametrize("which", ["tiny_base", "untied_base"])
def test_both_ways_are_measured_whichever_is_taken(
    which: str, inputs: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(which)
    adapter = make_adapter(base, inputs["folder"] / "adapter", NF4)
    original = merge(base, adapter, inputs, "one")
    dequantized = merge(base, adapter, inputs, "two", onto="dequantized")
    assert set(original) == {
        "tensors",
        "changed_tensors",
        "new_tokens",
        "max_logit_difference",
        "size_bytes",
        "onto",
        "compare",
    }
    assert (original["onto"], dequantized["onto"]) == ("original", "dequantized")
    assert original["changed_tensors"] == dequantized["changed_tensors"] == 2
    assert max(original["max_logit_difference"], dequantized["max_logit_difference"]) < 1e-5
    # In float32, the dequantised weights with the adapter's are the model of training.
    for numbers in (original, dequantized):
        assert abs(numbers["compare"]["dequantized"]["mean_kl"]) < 1e-7
        assert numbers["compare"]["dequantized"]["top1_agreement"] == 1.0
        assert numbers["compare"]["original"]["mean_kl"] > 1e-4
    # A model that is changed in place is the one that would have been written.
    assert original["compare"] == dequantized["compare"]
    files = [load_file(inputs["folder"] / name / "merged/model.safetensors") for name in ("one", "two")]
    changed = {name for name in files[0] if not torch.equal(files[0][name], files[1][name])}
    four_bit = read_trained_on(adapter, base)
    assert four_bit is not None
    assert changed == {f"{layer}.weight" for layer in four_bit["layers"]}
    assert len(changed) == 7


@pytest.fixture(scope="module")
def uneven_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 72 and 104 values: the blocks of 64 that have one scale begin inside rows."""
    shape = {"hidden_size": 72, "intermediate_size": 104, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=1, vocab_size=29, bos_token_id=1, eos_token_id=2))
    return save_base(model, tmp_path_factory.mktemp("uneven"))


@pytest.fixture(scope="module")
def conv1d_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": 29}
    return save_base(
        GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=1, eos_token_id=2)), tmp_path_factory.mktemp("gpt2")
    )


def save_base(model: Any, folder: Path) -> Path:
    torch.manual_seed(3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    write_json(folder / "base.json", {"kind": "scratch"})
    return folder


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("which", ["untied_base", "uneven_base", "conv1d_base"])
def test_a_merge_onto_dequantised_weights_is_the_live_model(
    which: str,
    kind: Any,
    options: dict[str, bool],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = request.getfixturevalue(which)
    monkeypatch.setattr("finetune.export.weights.BLOCK_VALUES", 1000)
    quantization = Quantization(format=kind, double_quantization=kind == "nf4")
    targets = ["c_attn", "c_proj", "c_fc"] if which == "conv1d_base" else ["q_proj", "down_proj"]
    adapter = make_adapter(base, tmp_path / "adapter", quantization, target_modules=targets, **options)
    said = read_trained_on(adapter, base)
    ways = ways_to_merge(said, "dequantized")
    live = load_trained(base, adapter, KEPT, said, torch.float32, CPU)
    with torch.inference_mode():
        expected = live(PROBE).logits
    merge_shards(base, adapter, tmp_path / "merged", "float32", [], ways["dequantized"])
    merge_shards(base, adapter, tmp_path / "plain", "float32", [])

    def distance(model: Any) -> float:
        with torch.inference_mode():
            return float((model(PROBE).logits - expected).abs().max())

    merged, plain = (reload(tmp_path / name, torch.float32) for name in ("merged", "plain"))
    assert distance(merged) < 1e-5
    assert distance(plain) > 1e-2
    for way, model in each_way(merged, ways, "dequantized", base, adapter, "float32", []):
        found = distance(model)
        assert found < 1e-5 if way == "dequantized" else found == distance(plain)


def test_a_base_of_sixteen_bit_has_nothing_to_compare(tiny_base: Path, inputs: dict[str, Path]) -> None:
    none = Quantization(format="none", double_quantization=False)
    adapter = make_adapter(tiny_base, inputs["folder"] / "adapter", none)
    assert "compare" not in merge(tiny_base, adapter, inputs, "merged")
    with pytest.raises(ExportError, match=r"no layer of the base was 4-bit in training"):
        merge(tiny_base, adapter, inputs, "other", onto="dequantized")


def test_so_many_rows_are_compared_in_order_of_id(
    tiny_base: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(tiny_base, inputs["folder"] / "adapter", NF4)
    seen: list[list[str]] = []

    def divergence(reference: Any, other: Any, rows: Any, label: str) -> dict[str, float]:
        seen.append([row["id"] for row in rows])
        return {"mean_kl": 0.0, "top1_agreement": 1.0}

    monkeypatch.setattr("finetune.stages.merge.divergence", divergence)
    merge(tiny_base, adapter, inputs, "one", compare_rows=1)
    merge(tiny_base, adapter, inputs, "all", compare_rows=9)
    assert seen == [["a"], ["a"], ["a", "b"], ["a", "b"]]


def test_the_stage_gives_the_same_bytes_again(tiny_base: Path, inputs: dict[str, Path]) -> None:
    adapter = make_adapter(tiny_base, inputs["folder"] / "adapter", NF4)
    for name in ("one", "two"):
        merge(tiny_base, adapter, inputs, name, dtype="bfloat16", max_logit_difference=0.1)
    assert sha256_tree(inputs["folder"] / "one") == sha256_tree(inputs["folder"] / "two")
    names = {"config.json", "generation_config.json", "model.safetensors", "chat_template.jinja", "tokenizer.json"}
    assert {file.name for file in (inputs["folder"] / "one/merged").iterdir()} == names | {"tokenizer_config.json"}


def test_a_difference_beyond_the_bound_is_an_error(tiny_base: Path, inputs: dict[str, Path]) -> None:
    adapter = make_adapter(tiny_base, inputs["folder"] / "adapter", NF4)
    with pytest.raises(ExportError, match=r"differ from base \+ adapter by 0\.0\d+, more than 1e-05"):
        merge(tiny_base, adapter, inputs, "merged", dtype="bfloat16", max_logit_difference=1e-5)


def test_another_base_is_refused_before_anything_is_written(
    tiny_base: Path, untied_base: Path, inputs: dict[str, Path]
) -> None:
    adapter = make_adapter(untied_base, inputs["folder"] / "adapter", NF4)
    with pytest.raises(DataError, match="trained on another base than this one"):
        merge(tiny_base, adapter, inputs, "merged")
    (adapter / "trained_on.json").unlink()
    with pytest.raises(DataError, match="does not say which base it was trained on"):
        merge(untied_base, adapter, inputs, "merged")
    assert not (inputs["folder"] / "merged").exists()
