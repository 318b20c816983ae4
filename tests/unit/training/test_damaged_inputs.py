"""Damage to what training reads, done behind DVC's back: which of it is seen, and what the user is told."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import CPU, KEPT, packed_rows
from training_settings import make_settings

from finetune.data.tables import PACKED, write_parquet
from finetune.errors import DataError
from finetune.io import sha256_file, write_json
from finetune.training import loop
from finetune.training.batches import RowSizes
from finetune.training.model import load_base, locate_base
from finetune.training.preparation import prepare

REVISION = "0123456789abcdef0123456789abcdef01234567"
SIZES = RowSizes(*(np.array([20]) for _ in range(3)))


@pytest.fixture
def hub_base(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """models/base of a Hub model, which the base stage verified, and its weights in the Hub cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    snapshot = tmp_path / "cache/models--someone--tiny/snapshots" / REVISION
    shutil.copytree(tiny_base, snapshot)
    names = ("config.json", "model.safetensors")
    files = [{"path": name, "sha256": sha256_file(snapshot / name), "size_bytes": 1} for name in names]
    base = tmp_path / "base"
    write_json(base / "base.json", {"kind": "hub", "repo_id": "someone/tiny", "revision": REVISION, "files": files})
    return base


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 0x40
    path.write_bytes(content)


def test_a_bit_flipped_in_the_hub_cache_after_the_base_stage_stops_training(hub_base: Path) -> None:
    """The weights of a Hub base are no out of DVC's: without this, a run trains on them in silence."""
    assert prepare(hub_base, KEPT, make_settings(), SIZES).device == CPU
    flip_a_bit(locate_base(hub_base) / "model.safetensors")
    with pytest.raises(DataError, match=r"SHA-256 is [0-9a-f]{64}, the manifest says(.|\n)*delete it, then dvc repro"):
        prepare(hub_base, KEPT, make_settings(), SIZES)


def test_base_weights_that_are_cut_short_say_what_to_do(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    weights = tmp_path / "base/model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(DataError, match=r"weights cannot be read: .*incomplete metadata(.|\n)*dvc repro --force"):
        load_base(tmp_path / "base", None, torch.float32, CPU)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_packed_rows_that_are_cut_short_say_what_to_do(share: float, tmp_path: Path) -> None:
    path = tmp_path / "packed.parquet"
    write_parquet(path, packed_rows(), PACKED)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(DataError, match=r"not a Parquet file: (.|\n)*delete the file and run `dvc repro`"):
        loop.open_rows(path, tmp_path / "run")
