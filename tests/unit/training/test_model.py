from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from finetune.errors import DataError, DeviceError
from finetune.io import sha256_file, write_json
from finetune.log import logger
from finetune.training.device import check_hardware
from finetune.training.model import four_bit_layers, load_base, locate_base, verify_base
from finetune.training_sections import Quantization, TrainQlora

CPU = torch.device("cpu")
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_base(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """models/base of a Hub model whose files lie in a Hub cache, as fetch leaves them."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    snapshot = tmp_path / "cache/models--someone--tiny/snapshots" / REVISION
    snapshot.mkdir(parents=True)
    names = ("config.json", "model.safetensors", "generation_config.json")
    for name in names:
        shutil.copyfile(tiny_base / name, snapshot / name)
    files = [{"path": name, "sha256": sha256_file(snapshot / name), "size_bytes": 1} for name in names]
    base = tmp_path / "base"
    write_json(base / "base.json", {"kind": "hub", "repo_id": "someone/tiny", "revision": REVISION, "files": files})
    return base


def test_a_hub_base_is_found_verified_and_loaded_in_four_bit(hub_base: Path) -> None:
    assert locate_base(hub_base).name == REVISION
    verify_base(hub_base)
    model = load_base(hub_base, Quantization(format="nf4", double_quantization=False), torch.float32, CPU)
    assert four_bit_layers(model) == 7
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_changed_weight_in_the_cache_is_found(hub_base: Path) -> None:
    weights = locate_base(hub_base) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(DataError, match=r"SHA-256 is [0-9a-f]{64}, the manifest says(.|\n)*model\.safetensors"):
        verify_base(hub_base)


def test_a_base_that_left_the_cache_says_how_to_fetch_it(hub_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub_base))
    with pytest.raises(DataError, match=r"someone/tiny at 0123(.|\n)*dvc repro --force --single-item fetch"):
        locate_base(hub_base)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("compute_dtype", "bfloat16", "on a CPU only float32 gives the same bytes everywhere"),
        ("optimizer", "adamw_torch", "optimizer adamw_torch gives other bytes on other CPUs"),
        ("optimizer", "paged_adamw_8bit", "or needs a CUDA device"),
    ],
)
def test_what_a_cpu_cannot_do_exactly_is_refused(key: str, value: str, message: str) -> None:
    settings = TrainQlora.model_construct(compute_dtype="float32", optimizer="adamw_torch_fused")
    check_hardware(settings, CPU)
    with pytest.raises(DeviceError, match=message):
        check_hardware(settings.model_copy(update={key: value}), CPU)


@pytest.mark.parametrize(("width", "message"), [(96, "4-bit rows of 96 values wrongly on a CPU"), (128, "")])
def test_rows_that_bitsandbytes_reads_wrongly_on_a_cpu_are_refused(tmp_path: Path, width: int, message: str) -> None:
    shape = {"hidden_size": width, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)).save_pretrained(tmp_path)
    write_json(tmp_path / "base.json", {"kind": "scratch"})
    nf4 = Quantization(format="nf4", double_quantization=True)
    cpu = torch.device("cpu")
    if message:
        with pytest.raises(DeviceError, match=message):
            load_base(tmp_path, nf4, torch.float32, cpu)
    else:
        assert four_bit_layers(load_base(tmp_path, nf4, torch.float32, cpu)) == 7


@pytest.mark.parametrize("wanted", ["none", "nf4"])
def test_a_base_that_is_quantised_itself_is_refused(tiny_base: Path, tmp_path: Path, wanted: str) -> None:
    nf4 = Quantization(format="nf4", double_quantization=True)
    load_base(tiny_base, nf4, torch.float32, CPU).save_pretrained(tmp_path)
    write_json(tmp_path / "base.json", {"kind": "scratch"})
    settings = Quantization(format=wanted, double_quantization=False)
    with pytest.raises(DataError, match=r"own weights are quantised \(bitsandbytes\)(.|\n)*of 16-bit weights"):
        load_base(tmp_path, settings, torch.float32, CPU)


def test_every_linear_layer_is_four_bit_but_the_output_and_none_without_quantisation(
    untied_base: Path, conv1d_base: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A test before this one may have set up logging as a stage does; pytest then sees each line of the logger twice.
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(logger, "handlers", [handler])
    caplog.set_level(logging.INFO, logger="finetune")
    formats = {name: Quantization(format=name, double_quantization=False) for name in ("none", "nf4", "fp4")}
    for base, layers in ((untied_base, 7), (conv1d_base, 4)):
        assert four_bit_layers(load_base(base, formats["none"], torch.float32, CPU)) == 0
        assert messages == []
        for name in ("nf4", "fp4"):
            assert four_bit_layers(load_base(base, formats[name], torch.float32, CPU)) == layers
            assert messages == [f"{layers} layers in 4 bit; not in 4 bit: lm_head"]
            messages.clear()
