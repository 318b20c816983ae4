"""The card of a training's machine: what it holds, what it must never hold, and how the page shows it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from run_files import RUN_CARD, facts_of, metrics

from finetune import machine_card
from finetune.io import read_json
from finetune.machine_card import Trained, write_run_card
from finetune.run_report.facts import RUN_CARD_FILE
from finetune.run_report.machine import machine_table, telemetry_table

TOKEN = "hf_" + "x1" * 17
TRAINED = Trained(
    steps=20, trained_tokens=4000, skipped_steps=1, processes=2, micro_batch_rows=4, attention="sdpa",
    deterministic=True, device="cpu",
)  # fmt: skip
HASHES = {name: name[0] * 64 for name in ("split", "base", "tokenizer", "adapter")}
POWER = "gpu_0_power_usage_watts"


@pytest.fixture
def card_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The card of a run of 100 s at 360 W, resumed once, in a folder outside git."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "WHATEVER"):
        monkeypatch.setenv(name, TOKEN)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"https://ann:{TOKEN}@example.org")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    times = ((0, 0.0), (0, 60.0), (1, 1000.0), (1, 1040.0))
    lines = [{"step": 1, "time_s": 1_700_000_000 + time_s, "process": number, POWER: 360.0} for number, time_s in times]
    lines[1] |= {"tokens_per_second": 120.5, "tokens_seconds": 50.0}
    (tmp_path / "telemetry.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_run_card(
        tmp_path / "run_card.json",
        TRAINED,
        seed=42,
        params={"epochs": 1},
        hashes=HASHES,
        telemetry=tmp_path / "telemetry.jsonl",
        root=tmp_path,
    )
    return tmp_path / "run_card.json"


def test_the_card_says_what_ran_how_long_and_with_what(card_file: Path) -> None:
    card = read_json(card_file)
    taken = {key: card[key] for key in ("steps", "trained_tokens", "skipped_steps", "attention", "deterministic")}
    assert taken == {
        "steps": 20,
        "trained_tokens": 4000,
        "skipped_steps": 1,
        "attention": "sdpa",
        "deterministic": True,
    }
    assert (card["started"], card["ended"]) == ("2023-11-14T22:13:20+00:00", "2023-11-14T22:30:40+00:00")
    assert (card["seconds"], card["resumes"], card["tokens_per_s"]) == (100.0, 1, 120.5)
    # 360 W for 100 s.
    assert card["energy_wh"] == 10.0
    assert card["telemetry"][POWER] == {"mean": 360.0, "p95": 360.0, "max": 360.0}
    assert card["sha256"] == {
        **HASHES,
        # sha256sum of {"epochs": 1}
        "params": "f75a221d071e920dcf2b5c0427c031a258af13e93e7a311732a5ed4f4355c7e9",
    }
    assert (card["git_commit"], card["git_dirty"], card["seed"]) == ("none", "none", 42)
    assert set(card["libraries"]) >= {"python", "torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate"}
    assert card["hardware"]["cpu"]["model"]
    assert 1 <= card["hardware"]["cpu"]["usable_threads"] <= (os.cpu_count() or 1)
    assert card["hardware"]["memory_bytes"] > 1 << 28


def test_of_the_environment_only_named_variables_are_recorded(card_file: Path) -> None:
    text = card_file.read_text(encoding="utf-8")
    assert read_json(card_file)["environment"]["CUDA_VISIBLE_DEVICES"] == "1,3"
    assert TOKEN not in text
    assert "ann" not in text
    assert set(read_json(card_file)["environment"]) <= set(machine_card.VARIABLES)
    assert str(card_file.parent) not in text


def test_a_machine_without_git_still_has_its_card(card_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card_file.unlink()
    monkeypatch.setenv("PATH", "")
    missing = card_file.parent / "missing.jsonl"
    write_run_card(card_file, TRAINED, seed=1, params={}, hashes=HASHES, telemetry=missing, root=card_file.parent)
    card = read_json(card_file)
    assert (card["git_commit"], card["seconds"], card["energy_wh"], card["telemetry"]) == ("none", None, None, {})


def test_the_page_shows_the_card_of_its_own_adapter_only(tmp_path: Path) -> None:
    assert facts_of(tmp_path, metrics()).run_card == RUN_CARD
    assert facts_of(tmp_path, metrics(), adapter_sha256="e" * 64).run_card == {}
    assert machine_table({}) is None
    assert machine_card.RUN_CARD_FILE == RUN_CARD_FILE


def test_a_card_that_was_written_can_be_shown_with_what_it_lacks(card_file: Path) -> None:
    card = read_json(card_file)
    content = machine_table({**card, "tokens_per_s": None, "energy_wh": None, "started": None})
    assert content is not None
    shown = {row[0].text: row[1].text for row in content.rows}
    assert (shown["speed"], shown["energy of the GPUs"]) == ("not measured", "not measured")
    assert shown["started, ended"] == "not measured, 2023-11-14T22:30:40+00:00"
    assert shown["micro-batch"] == "4 packed rows on each of 2 processes"
    assert "GPU" not in shown
    rows = [[cell.text for cell in row] for row in telemetry_table(card).rows]
    assert rows == [["GPU 0 power usage, W", "360", "360", "360"], ["speed, tokens/s", "120", "120", "120"]]
