"""A prepared process whose forks train and die, and the run that nothing disturbed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_runs import Whole, forks_in
from faulty_run import Forks


@pytest.fixture(scope="module")
def forks(tiny_base: Path, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with forks_in(tmp_path_factory.mktemp("forks"), tiny_base, tiny_tokenizer) as started:
        yield started


@pytest.fixture(scope="module")
def whole(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(forks, tmp_path_factory.mktemp("whole"))
