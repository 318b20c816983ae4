from __future__ import annotations

from pathlib import Path

import pytest
import tiny_gguf

from finetune.errors import ExportError
from finetune.export import speed
from finetune.io import read_json


def test_speed_and_memory_of_a_real_file_are_written(tmp_path: Path) -> None:
    file, target = tmp_path / "model-F32.gguf", tmp_path / "cache" / "speed.json"
    tiny_gguf.write_gguf(file, tiny_gguf.train_tokenizer(), "{{ bos_token }}", add_bos=True, answer="a")
    figures = speed.measure_speed({"F32": file}, {"F32": {"sha256": "0" * 64}}, 1, target)
    assert read_json(target) == figures
    assert sorted(figures["F32"]) == ["machine", "new_tokens_per_s", "peak_rss_mib", "prompt_tokens_per_s", "sha256"]
    assert figures["F32"]["sha256"] == "0" * 64
    assert figures["F32"]["machine"].endswith(", 1 thread(s)")
    # One layer of 256: reading 128 tokens at once is always faster than 32 one by one.
    assert figures["F32"]["prompt_tokens_per_s"] > figures["F32"]["new_tokens_per_s"] > 1
    # Python and numpy alone; this test's own process, with torch, holds several times as much.
    assert 20 < figures["F32"]["peak_rss_mib"] < 250


def test_a_file_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"finetune\.export\.speed ended with code 1"):
        speed.measure_speed({"F16": tmp_path / "none.gguf"}, {"F16": {"sha256": ""}}, 1, tmp_path / "speed.json")
    assert not (tmp_path / "speed.json").exists()


def test_the_measurement_takes_no_torch_along() -> None:
    import subprocess
    import sys

    code = "import sys, finetune.export.speed; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
