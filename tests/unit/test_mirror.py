"""A training and its run in MLflow, while both are well, and how the run ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mirror_runs import (
    PARAMS_FILE,
    eventually,
    log,
    make_database,
    mirror_of,
    rows,
    shown_warnings,
    statuses,
    steps,
    use_database,
)

from finetune.errors import StoppedError
from finetune.lineage import run_params
from finetune.params import load_params
from finetune.tracking import TrainingMirror
from finetune.tracking.client import PATIENT, connect
from finetune.tracking.registry import ADAPTER_TAG, CONTENT_TAG, ensure_curves, find_or_create_run


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_database(tmp_path_factory.mktemp("database"))


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: Path) -> str:
    return use_database(database, tmp_path, monkeypatch)


@pytest.fixture
def mirror(tmp_path: Path) -> TrainingMirror:
    return mirror_of(tmp_path)


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    with shown_warnings() as shown:
        yield shown


def test_a_resumed_training_is_one_run_with_the_whole_curve(
    tmp_path: Path, mirror: TrainingMirror, warnings: list[str]
) -> None:
    log(tmp_path, 1, 2)
    with mirror:
        assert statuses(tmp_path) == []
        mirror.begin(resumed_from_step=2)
        eventually(lambda: statuses(tmp_path) == ["RUNNING"])
        eventually(lambda: steps(tmp_path) == [1, 2])
        log(tmp_path, 3)
        log(tmp_path, 1, file="telemetry.jsonl", gpu_0_power_usage_watts=613.2, process=0)
        mirror.finish("ab" * 32)
    client = connect(PATIENT)
    (run,) = client.search_runs([client.get_experiment_by_name("finetune").experiment_id])
    assert (run.info.status, run.data.tags["adapter_sha256"], run.data.tags["resumed_from_step"]) == (
        "FINISHED",
        "ab" * 32,
        "2",
    )
    assert run.data.params["seed"] == "42"
    points = client.get_metric_history(run.info.run_id, "train_loss")
    assert [(point.step, point.value, point.timestamp) for point in sorted(points, key=lambda point: point.step)] == [
        (1, 4.0, 1_700_000_001_000),
        (2, 2.0, 1_700_000_002_000),
        (3, pytest.approx(4 / 3), 1_700_000_003_000),
    ]
    assert run.data.metrics["system/gpu_0_power_usage_watts"] == 613.2
    assert warnings == []
    params = run_params(load_params(PARAMS_FILE))
    assert (
        find_or_create_run(client, "finetune", {ADAPTER_TAG: "ab" * 32, CONTENT_TAG: "cd" * 32}, params)
        == run.info.run_id
    )
    assert ensure_curves(client, run.info.run_id, {step: {"train_loss": 4.0 / step} for step in (1, 2, 3, 4)}) == 1


@pytest.mark.parametrize(
    ("fault", "status"),
    [(ValueError("x"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (StoppedError("x", "x", "x"), "KILLED")],
)
def test_a_training_that_ends_early_ends_its_run(
    tmp_path: Path, mirror: TrainingMirror, fault: BaseException, status: str
) -> None:
    def train() -> None:
        with mirror:
            mirror.begin(0)
            eventually(lambda: statuses(tmp_path) == ["RUNNING"])
            log(tmp_path, 1)
            raise fault

    with pytest.raises(type(fault)):
        train()
    assert statuses(tmp_path) == [status]
    assert steps(tmp_path) == [1]
    assert rows(tmp_path, "select key from tags where key in ('adapter_sha256', 'resumed_from_step')") == []


TRAINING = """
import sys, time
from pathlib import Path
from finetune.tracking import TrainingMirror
folder, params = map(Path, sys.argv[1:])
with TrainingMirror(folder / "log.jsonl", folder / "telemetry.jsonl", params) as mirror:
    mirror.begin(0)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_training_that_is_killed_has_its_run_closed(tmp_path: Path, number: int) -> None:
    log(tmp_path, 1, 2)
    training = subprocess.Popen([sys.executable, "-c", TRAINING, tmp_path, PARAMS_FILE])
    eventually(lambda: steps(tmp_path) == [1, 2])
    log(tmp_path, 3)
    training.send_signal(number)
    assert training.wait() == -number
    eventually(lambda: statuses(tmp_path) == ["KILLED"])
    assert steps(tmp_path) == [1, 2, 3]
