"""Conversion and quantisation by the real llama.cpp, on a small Llama with a byte-level BPE trained here."""

from __future__ import annotations

from pathlib import Path

import llama_cpp
import pytest
import tiny_gguf
import torch
from tiny_llama import TEXTS, write_merged
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from finetune.errors import ExportError
from finetune.evaluation.perplexity import compare, model_logits
from finetune.export import gguf
from finetune.export.gguf_types import describe, fallbacks, tensor_types


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_merged(tmp_path_factory.mktemp("merged"))


@pytest.fixture(scope="module")
def whole(merged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    gguf.convert(merged, file, "f32", "tiny")
    return file


def test_token_ids_of_hostile_text_are_equal(merged: Path, whole: Path) -> None:
    ours = PreTrainedTokenizerFast.from_pretrained(merged)
    theirs = llama_cpp.Llama(str(whole), vocab_only=True, verbose=False)
    for text in TEXTS:
        assert (
            theirs.tokenize(text.encode(), add_bos=False, special=True)
            == ours(text, add_special_tokens=False).input_ids
        )


def test_float32_logits_are_equal_within_one_in_ten_thousand(merged: Path, whole: Path) -> None:
    ids = PreTrainedTokenizerFast.from_pretrained(merged)(TEXTS[0]).input_ids
    expected = model_logits(LlamaForCausalLM.from_pretrained(merged).eval())(ids)
    obtained = gguf.llama_logits(gguf.load(whole, 64, 1))(ids)
    assert float((expected - obtained).abs().max()) < 1e-4


def test_types_are_real_and_lose_more_the_smaller_they_are(merged: Path, whole: Path, tmp_path: Path) -> None:
    ids = PreTrainedTokenizerFast.from_pretrained(merged)(TEXTS[0]).input_ids
    reference = model_logits(LlamaForCausalLM.from_pretrained(merged).eval())(ids)
    losses, sizes = [], []
    for name in ("F16", "Q8_0", "Q4_K_M"):
        file = tmp_path / f"{name}.gguf"
        gguf.quantize(whole, file, name, 1)
        logits = gguf.llama_logits(gguf.load(file, 64, 1))(ids)
        losses.append(compare(reference, logits, ids, [True] * len(ids)).summary()["mean_kl"])
        sizes.append(file.stat().st_size)
    assert losses == sorted(losses)
    assert sizes == sorted(sizes, reverse=True)
    assert tensor_types(tmp_path / "Q4_K_M.gguf") == {"F32": 5, "Q4_K": 12, "Q6_K": 3}
    assert tensor_types(tmp_path / "Q8_0.gguf") == {"F32": 5, "Q8_0": 15}


def test_equal_input_gives_equal_bytes(merged: Path, whole: Path, tmp_path: Path) -> None:
    gguf.convert(merged, tmp_path / "again.gguf", "f32", "tiny")
    assert (tmp_path / "again.gguf").read_bytes() == whole.read_bytes()
    for threads in (1, 2):
        gguf.quantize(whole, tmp_path / f"{threads}.gguf", "Q4_K_M", threads)
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "2.gguf").read_bytes()


def test_a_source_that_llama_cpp_refuses_leaves_no_target_and_gives_its_reason(whole: Path, tmp_path: Path) -> None:
    source = tmp_path / "source.gguf"
    source.write_bytes(whole.read_bytes().replace(b"llama.block_count", b"llama.block_coutn"))
    with pytest.raises(ExportError, match=r"(?s)finetune\.export\.quantizer ended with code 1.*llama\.block_count"):
        gguf.quantize(source, tmp_path / "target.gguf", "Q8_0", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.gguf"]


@pytest.mark.parametrize("kept_bytes", [0, 3, 40, 5_000, -1])
def test_a_damaged_source_is_refused(whole: Path, tmp_path: Path, kept_bytes: int) -> None:
    source = tmp_path / "source.gguf"
    source.write_bytes(whole.read_bytes()[:kept_bytes])
    with pytest.raises(ExportError, match=r"the file is empty|not a GGUF|cut short or damaged|the GGUF is cut short"):
        gguf.quantize(source, tmp_path / "target.gguf", "Q8_0", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.gguf"]


def test_a_missing_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="the GGUF file is missing"):
        gguf.quantize(tmp_path / "none.gguf", tmp_path / "target.gguf", "Q8_0", 1)


def test_what_is_quantised_is_not_quantised_again(whole: Path, tmp_path: Path) -> None:
    gguf.quantize(whole, tmp_path / "once.gguf", "Q8_0", 1)
    with pytest.raises(ExportError, match="the source holds Q8_0: quantising it again would lose twice"):
        gguf.quantize(tmp_path / "once.gguf", tmp_path / "twice.gguf", "Q4_K_M", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["once.gguf"]


def test_a_source_is_not_its_own_target(whole: Path, tmp_path: Path) -> None:
    before = whole.read_bytes()
    (tmp_path / "link.gguf").symlink_to(whole)
    with pytest.raises(ExportError, match="source and target are the same file"):
        gguf.quantize(whole, tmp_path / "link.gguf", "F16", 1)
    assert whole.read_bytes() == before


def test_every_type_is_made_and_is_what_its_name_says(whole: Path, tmp_path: Path) -> None:
    expected = {
        "F16": {"F16": 15, "F32": 5},
        "BF16": {"BF16": 15, "F32": 5},
        "Q8_0": {"F32": 5, "Q8_0": 15},
        "Q6_K": {"F32": 5, "Q6_K": 15},
        "Q5_K_M": {"F32": 5, "Q5_K": 12, "Q6_K": 3},
        "Q4_K_M": {"F32": 5, "Q4_K": 12, "Q6_K": 3},
        "Q3_K_M": {"F32": 5, "Q3_K": 8, "Q4_K": 4, "Q5_K": 2, "Q6_K": 1},
    }
    for name, types in expected.items():
        file = tmp_path / f"{name}.gguf"
        gguf.quantize(whole, file, name, 1)
        assert tensor_types(file) == types
        assert fallbacks(file, name) == {}
    assert describe(tmp_path / "Q8_0.gguf", "Q8_0")["size_bytes"] == (tmp_path / "Q8_0.gguf").stat().st_size


def plain_gguf(path: Path, width: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tiny_gguf, "WIDTH", width)
    tiny_gguf.write_gguf(path, tiny_gguf.train_tokenizer(), "{{ bos_token }}", add_bos=True, answer="a")
    return path


def test_rows_that_fit_no_block_are_counted_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = plain_gguf(tmp_path / "source.gguf", 96, monkeypatch), tmp_path / "target.gguf"
    gguf.quantize(source, target, "Q4_K_M", 1)
    described = describe(target, "Q4_K_M")
    assert described["fallbacks"] == {
        "blk.*.attn_k.weight Q5_0": 1,
        "blk.*.attn_output.weight Q5_0": 1,
        "blk.*.attn_q.weight Q5_0": 1,
        "blk.*.attn_v.weight Q8_0": 1,
        "blk.*.ffn_down.weight Q8_0": 1,
        "blk.*.ffn_gate.weight Q5_0": 1,
        "blk.*.ffn_up.weight Q5_0": 1,
        "output.weight Q8_0": 1,
        "token_embd.weight Q5_0": 1,
    }
    assert described["fallback_tensors"] == 9
    gguf.quantize(source, tmp_path / "small.gguf", "Q8_0", 1)
    assert fallbacks(tmp_path / "small.gguf", "Q8_0") == {}


def test_a_file_that_stayed_in_16_bit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = plain_gguf(tmp_path / "source.gguf", 48, monkeypatch)
    with pytest.raises(ExportError, match=r"\d\d% of the values of Q8_0 stayed in 16 bit: rows such as the 48 of"):
        gguf.quantize(source, tmp_path / "target.gguf", "Q8_0", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.gguf"]
    gguf.quantize(source, tmp_path / "target.gguf", "F16", 1)


def test_the_whole_gguf_is_removed_at_the_end(merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "convert", lambda _merged, target, *_: target.write_bytes(b"whole"))

    def stopped() -> None:
        with gguf.whole_gguf(merged, tmp_path, "bfloat16", "tiny", {}) as made:
            assert made.read_bytes() == b"whole"
            raise ExportError("stop", made, "nothing")

    with pytest.raises(ExportError, match="stop"):
        stopped()
    assert list(tmp_path.iterdir()) == []


def test_files_share_memory_as_far_as_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {}
    for name, size in {"F16": 160, "Q8_0": 85, "Q4_K_M": 49}.items():
        (tmp_path / name).write_bytes(bytes(size))
        files[name] = tmp_path / name
    for free, expected in (
        (600, [["F16", "Q8_0", "Q4_K_M"]]),
        (400, [["F16"], ["Q8_0", "Q4_K_M"]]),
        (10, [["F16"], ["Q8_0"], ["Q4_K_M"]]),
    ):
        monkeypatch.setattr(gguf, "free_memory_bytes", lambda free=free: free)
        assert [list(group) for group in gguf.memory_groups(files, 0, 0)] == expected
    # Half of 700 holds the files, and not the logits of a row of 3 tokens out of 5 beside each: 120 bytes more.
    monkeypatch.setattr(gguf, "free_memory_bytes", lambda: 700)
    assert [list(group) for group in gguf.memory_groups(files, 3, 5)] == [["F16"], ["Q8_0"], ["Q4_K_M"]]
    monkeypatch.undo()
    assert gguf.free_memory_bytes() > 1 << 20


def test_the_greedy_answer_is_that_of_transformers(merged: Path, whole: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(merged).eval()
    ids = PreTrainedTokenizerFast.from_pretrained(merged)(TEXTS[0]).input_ids
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(torch.tensor([ids]), max_new_tokens=12, **settings)[0, len(ids) :].tolist()
    with gguf.opened({"F32": whole}, 64, 1) as models:
        _, continue_ids = models["F32"]
        assert continue_ids(ids, 12, {2}) == expected
        assert continue_ids(ids, 12, {expected[4]}) == expected[: expected.index(expected[4]) + 1]
        assert len(continue_ids(ids, 1000, set())) == 64 - len(ids)
        assert continue_ids(list(range(3, 67)), 12, {2}) == []


def test_a_missing_converter_says_make_setup(merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_TOOLS", str(tmp_path))
    with pytest.raises(ExportError, match="make setup"):
        gguf.convert(merged, tmp_path / "x.gguf", "f32", "tiny")


def test_too_small_a_disk_is_refused(tmp_path: Path) -> None:
    gguf.check_disk(1_000_000, 16, ["Q8_0"], tmp_path)
    with pytest.raises(ExportError, match=r"the GGUF files need about [\d,]+ bytes, and [\d,]+ are free"):
        gguf.check_disk(10**15, 16, ["Q8_0", "Q4_K_M"], tmp_path)


def test_a_merged_model_that_memory_cannot_hold_is_refused() -> None:
    assert gguf.reference_dtype(1000, torch.bfloat16, torch.device("cpu")) == torch.float32
    assert gguf.reference_dtype(10**15, torch.bfloat16, torch.device("cuda")) == torch.bfloat16
    with pytest.raises(ExportError, match=r"needs 4,000,000,000,000,000 bytes of memory in float32"):
        gguf.reference_dtype(10**15, torch.bfloat16, torch.device("cpu"))
