from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from training_settings import make_settings

from finetune.errors import DeviceError
from finetune.training.layer_kernels import liger_arguments

CUDA = torch.device("cuda:0")
USED = make_settings(liger_kernels=True)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with liger-kernel's table of model types; the real one needs triton, and so a CUDA build of torch."""
    package = tmp_path / "liger_kernel" / "transformers"
    package.mkdir(parents=True)
    (tmp_path / "liger_kernel" / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "monkey_patch.py").write_text("MODEL_TYPE_TO_APPLY_LIGER_FN = {'llama': None}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.monkey_patch"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_without_liger_the_trainer_is_told_nothing() -> None:
    assert liger_arguments(make_settings(), "gpt2", torch.device("cpu")) == {}


def test_liger_on_a_cpu_is_refused() -> None:
    with pytest.raises(DeviceError, match="need a CUDA device"):
        liger_arguments(USED, "llama", torch.device("cpu"))


def test_liger_that_is_not_installed_is_refused_with_the_command() -> None:
    with pytest.raises(DeviceError, match=r"not installed(.|\n)*pip install liger-kernel==0.8.5"):
        liger_arguments(USED, "llama", CUDA)


@pytest.mark.usefixtures("installed")
def test_layer_kernels_are_on_and_its_output_layer_is_off() -> None:
    found = liger_arguments(USED, "llama", CUDA)
    assert found["use_liger_kernel"] is True
    assert sorted(name for name, used in found["liger_kernel_config"].items() if used) == [
        "geglu",
        "layer_norm",
        "rms_norm",
        "rope",
        "swiglu",
    ]
    assert found["liger_kernel_config"]["fused_linear_cross_entropy"] is False


@pytest.mark.usefixtures("installed")
def test_a_model_without_kernels_is_refused() -> None:
    with pytest.raises(DeviceError, match="no kernels for gpt2"):
        liger_arguments(USED, "gpt2", CUDA)
