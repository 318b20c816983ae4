"""The training benchmarks at miniature scale: what they count, compare and report, not how fast anything is."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from finetune.io import read_json

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import peer_throughput
import plain_trl
import throughput_case
import train_process
import train_resume
import train_throughput
from throughput_work import FULL, LLAMA_8B, MINIATURE, Clock, document_lengths, flops_per_token, packed_rows

CPU = torch.device("cpu")


@pytest.mark.parametrize(("mode", "gflop"), [("none", 33.20), ("selective", 47.24), ("full", 47.78)])
def test_arithmetic_of_llama_8b_in_documents_of_2048_tokens(mode: str, gflop: float) -> None:
    assert flops_per_token(LLAMA_8B, [2048], mode) / 1e9 == pytest.approx(gflop, abs=0.005)


def test_longer_documents_and_untrained_tokens_change_the_arithmetic() -> None:
    # One of 4096 tokens beside two of 2048: half of the tokens see twice as many others.
    assert flops_per_token(LLAMA_8B, [4096, 2048, 2048], "none") / 1e9 == pytest.approx(34.14, abs=0.005)
    assert flops_per_token(LLAMA_8B, [2048], "none", trained=0.0) / 1e9 == pytest.approx(30.05, abs=0.005)


def test_every_step_has_as_many_tokens_in_documents_of_about_two_thousand() -> None:
    rows = document_lengths(FULL)
    lengths = [length for row in rows for length in row]
    assert len(rows) == 40
    assert {sum(row) for row in rows} == {8192}
    assert len(lengths) == 160
    assert 512 <= min(lengths) < max(lengths) <= 3584
    assert [len(row["input_ids"]) for row in packed_rows(MINIATURE)] == [128] * 6


def test_the_clock_leaves_out_the_warm_up_and_counts_every_step() -> None:
    clock = Clock(CPU, warmup=2, steps=5)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    hook = register_optimizer_step_post_hook(clock)
    for _ in range(4):
        optimizer.step()
    with pytest.raises(RuntimeError, match="4 optimizer steps were taken, 5 expected"):
        clock.figures(100)
    optimizer.step()
    hook.remove()
    optimizer.step()
    clock.marks[:] = [0.0, 1.0, 1.5, 3.5, 4.0]
    clock.walls_s[:] = [1.0, 5.0]
    assert clock.figures(100) == {
        "tokens_per_step": 100,
        "tokens_per_s": 200.0,
        "tokens_per_s_over_all_counted_steps": 75.0,
        "step_ms": {"min": 500.0, "median": 500.0, "max": 2000.0},
        "counted_steps": 3,
    }


@pytest.mark.parametrize("name", ["ours_selective", "trl_defaults"])
def test_a_case_of_the_throughput_benchmark_gives_its_figures(name: str, tmp_path: Path) -> None:
    case = {**train_throughput.CASES[name], "liger": False}
    work = throughput_case.ours if name.startswith("ours") else throughput_case.trl
    result = work(case, MINIATURE, tmp_path)
    assert (result["tokens_per_step"], result["counted_steps"]) == (256, 2)
    shares = train_throughput.shares(result, case, MINIATURE, rate=1e9)
    # 9.07 MFLOP a token at 1 GFLOP/s; 9.03 where attention is not done again.
    assert shares["ceiling_tokens_per_s"] == (110.3 if name == "trl_defaults" else 110.7)
    assert shares["share_of_ceiling"] == pytest.approx(
        result["tokens_per_s"] / shares["ceiling_tokens_per_s"], rel=1e-3
    )


def test_a_case_that_fails_is_a_result_and_not_the_end(tmp_path: Path) -> None:
    def run(code: str) -> dict[str, Any]:
        return train_throughput.run_case([sys.executable, "-c", code], {}, tmp_path, 5.0)

    assert run("raise ValueError('no memory')")["fault"] == "exit code 1: ValueError: no memory"
    assert run("import time; time.sleep(60)")["fault"].startswith("stopped after 5 s")
    assert train_throughput.run_case(["/no/such/python"], {}, tmp_path, 5.0)["fault"].startswith("cannot be started")
    halved = run("print('train: out of memory at step 3: micro-batches in 2 parts from here')")
    assert halved["times_halved"] == 1
    assert train_throughput.shares(halved, train_throughput.PLAIN, MINIATURE, 1e9) == {}


def test_a_peers_tokens_are_counted_where_the_model_looks_them_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaForCausalLM

    def peer(checkpoint: Path, scale: dict[str, Any], folder: Path) -> None:
        model = LlamaForCausalLM.from_pretrained(checkpoint)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        assert tokenizer("<s> w17 w3 </s>")["input_ids"] == [1, 17, 3, 2]
        rows = Dataset.from_list(packed_rows(scale))
        plain_trl.train_with_defaults(model, tokenizer, rows, folder, 2, use_cpu=True, bf16=False)

    monkeypatch.setitem(peer_throughput.PEERS, "plain", peer)
    made = peer_throughput.make_checkpoint(MINIATURE, tmp_path / "checkpoint")
    # 2 layers of 589,824 + 512, norm of 256 and two tables of 131,072, in two bytes each.
    assert made == {"size_gb": 0.003}
    figures = peer_throughput.measure("plain", MINIATURE, tmp_path / "checkpoint", tmp_path)
    assert (figures["tokens_per_step"], figures["counted_steps"]) == (256.0, 2)


def test_a_killed_run_of_the_resume_benchmark_ends_in_the_bytes_of_a_whole_one(tmp_path: Path) -> None:
    inputs = tmp_path / "inputs"
    train_resume.make_inputs(inputs)
    whole, killed = (train_resume.request(inputs, tmp_path / name) for name in ("whole", "killed"))
    train_resume.ours(whole)
    code, stderr = train_resume.start("ours", inputs, tmp_path / "killed", kill_at_step=7)
    assert code == -signal.SIGKILL, stderr
    train_resume.damage(train_resume.newest(tmp_path / "killed"), "tensors-*.safetensors", "flipped")
    train_resume.ours(killed)
    assert read_json(tmp_path / "killed/report.json") == {"from_step": 3}
    assert train_resume.compared(tmp_path / "killed/adapter", tmp_path / "whole/adapter") == {
        "equal_bytes": True,
        "max_abs_difference": 0.0,
    }
    (tmp_path / "trl").mkdir()
    plain_trl.train(train_resume.request(inputs, tmp_path / "trl"))
    assert read_json(tmp_path / "trl/report.json")["steps"] == 20
    beside = train_resume.compared(tmp_path / "trl/adapter", tmp_path / "whole/adapter")
    assert (beside["equal_bytes"], beside["max_abs_difference"] > 0.001) == (False, True)


def test_damage_cuts_removes_or_flips_one_bit_of_the_last_file(tmp_path: Path) -> None:
    for how, left in (("cut", bytes(16)), ("flipped", bytes(27) + b"\x01" + bytes(4)), ("missing", None)):
        (tmp_path / "part-1").write_bytes(bytes(32))
        (tmp_path / "part-2").write_bytes(bytes(32))
        train_resume.damage(tmp_path, "part-*", how)
        assert (tmp_path / "part-1").read_bytes() == bytes(32)
        assert ((tmp_path / "part-2").read_bytes() if left else None) == left


def test_the_last_exception_of_a_process_names_its_crash() -> None:
    stderr = "ValueError: first\n\nDuring handling\nsafetensors_rust.SafetensorError: header\n"
    assert train_resume.exception_name(stderr) == "SafetensorError"
    assert train_resume.exception_name("Killed\n") == "no exception was named"


def test_a_process_is_timed_to_its_first_step_and_its_end(tmp_path: Path) -> None:
    code = """
import pathlib, time
time.sleep(0.3)
log = pathlib.Path(".cache/checkpoints/key/train_log.jsonl")
log.parent.mkdir(parents=True)
log.write_text("{}")
time.sleep(0.6)
"""
    # The kernel starts a child's peak at the size of the process that starts it: here a small one, as the script is.
    measure = "import json, sys, train_process; from pathlib import Path; code, folder = sys.argv[1:]; "
    measure += "print(json.dumps(train_process.measure([sys.executable, '-c', code], Path(folder), {})))"
    small = [sys.executable, "-c", measure, code, str(tmp_path)]
    path = {**os.environ, "PYTHONPATH": str(Path(train_process.__file__).parent)}
    cost = json.loads(subprocess.run(small, env=path, capture_output=True, text=True, check=True).stdout)
    assert cost["wall_s"] > 0.9
    assert 0.0 < cost["peak_rss_gib"] < 1.0
    shutil.rmtree(tmp_path / ".cache")
    first = train_process.first_step([sys.executable, "-c", code], tmp_path, {})
    assert 0.3 < first["first_step_s"] < cost["wall_s"] - 0.4
    assert 0.0 < first["first_step_cpu_s"] < first["first_step_s"]
    shutil.rmtree(tmp_path / ".cache")
    with pytest.raises(subprocess.CalledProcessError, match="returned non-zero exit status 3"):
        train_process.first_step([sys.executable, "-c", "import sys; sys.exit(3)"], tmp_path, {})


@pytest.mark.parametrize(
    ("wall_s", "first_s", "steps", "passed"),
    [(110.0, 10.0, 365, True), (111.0, 10.0, 365, False), (90.0, 10.1, 365, False), (90.0, 9.0, 364, False)],
)
def test_the_process_benchmark_passes_within_its_bars(wall_s: float, first_s: float, steps: int, passed: bool) -> None:
    plain = {"wall_s": 100.0, "cpu_s": 100.0, "peak_rss_gib": 1.0, "validation_loss": 3.0}
    ours = {**plain, "wall_s": wall_s, "steps": steps}
    round_of_each = {"ours": ours, "trl_same_arithmetic": {**plain, "steps": 365}, "trl": {**plain, "steps": 365}}
    round_of_each["trl"]["wall_s"] = 50.0
    seconds = {"ours": first_s, "trl_same_arithmetic": 10.0, "trl": 10.0}
    starts = {way: {"first_step_s": value, "first_step_cpu_s": 9.0} for way, value in seconds.items()}
    result = train_process.summary([starts] * 3, [round_of_each] * 3)
    assert result["passed"] is passed
    assert result["ours_over_trl_same_arithmetic"]["wall_s"]["of_medians"] == wall_s / 100
    assert result["ours_over_trl"]["wall_s"]["of_medians"] == wall_s / 50
