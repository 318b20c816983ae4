"""The importance matrix against the figures of llama.cpp's own tool, and what it does to the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf as gguf_library
import numpy as np
import pytest
import torch
from tiny_llama import TEXTS, write_merged
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

from finetune.errors import ExportError
from finetune.evaluation.perplexity import compare, model_logits
from finetune.export import gguf
from finetune.export.importance import collect_importance

# llama-imatrix of the vendored llama.cpp (llama-cpp-python 0.3.36) on this model and these ids:
# -c 32 -b 32 --chunks 3 -fa off -ctk f32 -ctv f32; in_sum2 / counts of the first three channels.
FROM_LLAMA_IMATRIX = {
    "blk.0.attn_q.weight": [0.708391, 1.30378, 1.44205],
    "blk.0.attn_output.weight": [0.0120055, 0.00571586, 0.0143479],
    "blk.0.ffn_gate.weight": [0.277635, 0.830548, 0.491497],
    "blk.0.ffn_down.weight": [0.00241288, 0.00177863, 0.00350022],
    "blk.1.attn_v.weight": [0.73189, 0.921758, 0.505107],
    "blk.1.attn_output.weight": [0.058666, 0.00978409, 0.0247955],
    "blk.1.ffn_up.weight": [0.420146, 0.773178, 0.390065],
    "blk.1.ffn_down.weight": [0.00165922, 0.00119519, 0.00061948],
}


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_merged(tmp_path_factory.mktemp("merged"))


@pytest.fixture(scope="module")
def whole(merged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    gguf.convert(merged, file, "f32", "tiny")
    return file


@pytest.fixture(scope="module")
def rows(merged: Path) -> list[dict[str, Any]]:
    ids = PreTrainedTokenizerFast.from_pretrained(merged)(" ".join(TEXTS) * 3, add_special_tokens=False).input_ids
    return [{"id": f"r{start:02}", "input_ids": ids[start : start + 32]} for start in (0, 32, 64)]


@pytest.fixture
def model(merged: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(merged).eval()


def test_the_figures_are_those_of_llama_cpps_own_tool(model: Any, rows: list[dict[str, Any]], whole: Path) -> None:
    matrix = collect_importance(model, rows, 3, whole)
    kinds = ("attn_k", "attn_output", "attn_q", "attn_v", "ffn_down", "ffn_gate", "ffn_up")
    assert sorted(matrix) == [f"blk.{layer}.{kind}.weight" for layer in (0, 1) for kind in kinds]
    for name, expected in FROM_LLAMA_IMATRIX.items():
        assert matrix[name].dtype == np.float32
        assert matrix[name][:3].tolist() == pytest.approx(expected, rel=1e-5)
    assert {name: len(values) for name, values in matrix.items() if "0" in name and len(values) != 256} == {
        "blk.0.ffn_down.weight": 512
    }


def test_nothing_is_left_on_the_model(model: Any, rows: list[dict[str, Any]], whole: Path) -> None:
    collect_importance(model, rows, 3, whole)
    assert [name for name, module in model.named_modules() if module._forward_pre_hooks] == []


def test_the_matrix_changes_k_types_and_says_so_in_the_file(
    model: Any, rows: list[dict[str, Any]], whole: Path, tmp_path: Path
) -> None:
    matrix = collect_importance(model, rows, 3, whole)
    for name, changed in (("Q4_K_M", True), ("Q3_K_M", True), ("Q8_0", False), ("F16", False)):
        plain, weighted = tmp_path / f"{name}.gguf", tmp_path / f"{name}-matrix.gguf"
        gguf.quantize(whole, plain, name, 1)
        gguf.quantize(whole, weighted, name, 1, matrix)
        assert (plain.read_bytes() != weighted.read_bytes()) is changed
        fields = gguf_library.GGUFReader(weighted).fields
        assert ("quantize.imatrix.entries_count" in fields) is changed
        if changed:
            assert fields["quantize.imatrix.entries_count"].contents() == 14
            tensors = gguf_library.GGUFReader(plain).tensors, gguf_library.GGUFReader(weighted).tensors
            same = [a.name for a, b in zip(*tensors, strict=True) if np.array_equal(a.data, b.data)]
            assert sorted(each for each in same if "norm" not in each) == ["token_embd.weight"]


def test_equal_matrices_give_equal_bytes(model: Any, rows: list[dict[str, Any]], whole: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        gguf.quantize(whole, tmp_path / name, "Q4_K_M", 1, collect_importance(model, rows, 3, whole))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_channels_that_matter_are_rounded_more_carefully(
    model: Any, rows: list[dict[str, Any]], whole: Path, tmp_path: Path
) -> None:
    """One input channel ten times the others, in every matrix: the matrix of such a model lowers the divergence."""
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[::16] *= 10
    model.save_pretrained(tmp_path / "merged")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "merged" / file).write_bytes((Path(model.name_or_path) / file).read_bytes())
    gguf.convert(tmp_path / "merged", tmp_path / "whole.gguf", "f32", "tiny")
    losses, ids = [], rows[0]["input_ids"]
    for matrix in (None, collect_importance(model, rows, 3, tmp_path / "whole.gguf")):
        gguf.quantize(tmp_path / "whole.gguf", tmp_path / "made.gguf", "Q3_K_M", 1, matrix)
        logits = gguf.llama_logits(gguf.load(tmp_path / "made.gguf", 64, 1))(ids)
        losses.append(compare(model_logits(model)(ids), logits, ids, [True] * 32).summary()["mean_kl"])
    assert losses[1] < 0.8 * losses[0]


def test_a_model_whose_matrices_are_no_linear_layers_is_refused(rows: list[dict[str, Any]], whole: Path) -> None:
    other = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_positions=64, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(
        ExportError, match=r"no importance can be measured for 11 of 14 matrices, such as blk\.0\."
    ) as caught:
        collect_importance(other, rows, 3, whole)
    assert caught.value.remedy == "set quantize_gguf.importance_matrix_rows: null"


def test_no_more_rows_are_taken_than_asked_for(model: Any, rows: list[dict[str, Any]], whole: Path) -> None:
    one = collect_importance(model, iter(rows), 1, whole)
    assert all(
        np.array_equal(one[name], values) for name, values in collect_importance(model, rows[:1], 9, whole).items()
    )
    assert collect_importance(model, iter(rows), None, whole) == {}


def test_rows_are_taken_in_the_order_of_their_ids_not_of_the_file(
    model: Any, rows: list[dict[str, Any]], whole: Path
) -> None:
    first, _, last = rows
    taken = collect_importance(model, iter([last, first]), 1, whole)
    assert all(
        np.array_equal(taken[name], values) for name, values in collect_importance(model, [first], 1, whole).items()
    )


def test_no_rows_are_refused(model: Any, whole: Path) -> None:
    with pytest.raises(ExportError, match="no training rows for the importance matrix"):
        collect_importance(model, [], 3, whole)
