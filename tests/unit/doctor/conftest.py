"""The recipes that doctor is asked about."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.params import Params, load_params

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def smoke() -> Params:
    return load_params(ROOT / "recipes/smoke/params.yaml")


@pytest.fixture(scope="module")
def dolores() -> Params:
    return load_params(ROOT / "recipes/dolores_v5/params.yaml")
