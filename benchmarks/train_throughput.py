"""QLoRA training speed on one GPU, a random Llama-3.1-8B: `python benchmarks/train_throughput.py`.

NF4, rank 16 on all layers, rows of 8192 tokens packed from documents of about 2048, 16k tokens an optimizer step,
bfloat16. Each case is a process of its own: this project with its checkpointing, attention, layer kernels and double
quantisation; plain TRL with its defaults on the same rows; with `--peer unsloth=PYTHON` (also axolotl, llamafactory) a
peer in its own environment. A case that fails says why, and the others go on; the result is written after each. Tokens
a second leave out the first 5 of 20 steps and come from device events. The ceiling is the arithmetic of
flops_per_token over a matrix product's rate measured in the same run. The layers of the base share one set of random
weights, made and quantised on the device: no product is faster for it, and nothing is read from disk (peers get 16 GB
of files in BENCHMARK_FOLDER, or where temporary files go).

`--minutes` ends the run, 9 if not given. Writes train_throughput.json, or `--output`. `--miniature` runs all cases at
a tiny scale on a CPU, which measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from process_tree import machine

HERE = Path(__file__).resolve().parent
PLAIN = {"checkpointing": "none", "attention": "varlen", "liger": True, "double_quantization": False}
# In the order in which they run, should the time not suffice for all.
CASES: dict[str, dict[str, Any]] = {
    "ours_none": PLAIN,
    "ours_full": {**PLAIN, "checkpointing": "full"},
    "trl_defaults": {"checkpointing": "full"},
    "ours_selective": {**PLAIN, "checkpointing": "selective"},
    "trl_no_checkpointing": {"checkpointing": "none"},
    "ours_none_sdpa": {**PLAIN, "attention": "sdpa"},
    "ours_none_no_liger": {**PLAIN, "liger": False},
    "ours_none_double_quantization": {**PLAIN, "double_quantization": True},
    "ours_none_deterministic": {**PLAIN, "deterministic": True},
    "ours_full_sdpa_no_liger": {**PLAIN, "checkpointing": "full", "attention": "sdpa", "liger": False},
}
PEERS = ("unsloth", "axolotl", "llamafactory")
CASE_LIMIT_S = 150.0
LEAST_S = 45.0
NOT_RUN = "not run: no time left"
OWN_COMMAND = [sys.executable, str(HERE / "throughput_case.py")]
GOALS = {"ours_full": 12_500, "ours_none": 17_000}


def run_case(command: list[str], request: Mapping[str, Any], folder: Path, limit_s: float) -> dict[str, Any]:
    """One case in a process of its own: its figures, or `fault` with the reason why there are none."""
    started = time.monotonic()
    file, answer = folder / "case.json", folder / "result.json"
    answer.unlink(missing_ok=True)
    file.write_text(json.dumps(request), encoding="utf-8")
    fault = ""
    with (folder / "output.log").open("w+", encoding="utf-8", errors="replace") as output:
        try:
            done = subprocess.run(
                [*command, str(file)], stdout=output, stderr=subprocess.STDOUT, timeout=limit_s, check=False
            )
            fault = f"exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            fault = f"stopped after {limit_s:.0f} s"
        except OSError as reason:
            fault = f"cannot be started: {reason}"
        output.seek(0)
        log = output.read()
    result: dict[str, Any] = {"fault": f"{fault}: {last_line(log)}"}
    if answer.is_file():
        result = json.loads(answer.read_text(encoding="utf-8"))
    # Our loop goes on in smaller parts when memory runs out; its figures are then those of smaller micro-batches.
    result["times_halved"] = log.count("out of memory at step")
    result["wall_s"] = round(time.monotonic() - started, 1)
    return result


def last_line(log: str) -> str:
    """What a process said last, which is the exception that ended it."""
    said = [line for line in log.splitlines() if line.strip()]
    return said[-1][:500] if said else "it said nothing"


def shares(result: Mapping[str, Any], case: Mapping[str, Any], scale: Mapping[str, Any], rate: float) -> dict[str, Any]:
    """The ceiling of a case, and the share of it that was reached."""
    from throughput_work import document_lengths, flops_per_token

    if "tokens_per_s" not in result:
        return {}
    lengths = [length for row in document_lengths(scale) for length in row]
    needed = {mode: flops_per_token(scale["shape"], lengths, mode) for mode in ("none", case["checkpointing"])}
    ceilings = {mode: rate / flops for mode, flops in needed.items()}
    own = ceilings[case["checkpointing"]]
    return {
        "gflop_per_token": round(needed[case["checkpointing"]] / 1e9, 3),
        "ceiling_tokens_per_s": round(own, 1),
        "share_of_ceiling": round(result["tokens_per_s"] / own, 4),
        "share_of_ceiling_without_checkpointing": round(result["tokens_per_s"] / ceilings["none"], 4),
    }


def commands(peers: Mapping[str, str]) -> dict[str, tuple[dict[str, Any], list[str]]]:
    """The cases by name: settings and command. Peers come behind the first four, ahead of the variants."""
    own = {name: (case, OWN_COMMAND) for name, case in CASES.items()}
    if find_spec("liger_kernel") is None:
        # Without the library the cases with its kernels are those without; the variant would measure them again.
        own = {
            name: ({**case, "liger": False} if case.get("liger") else case, command)
            for name, (case, command) in own.items()
        }
        del own["ours_none_no_liger"]
    others = {
        # Each peer checkpoints as its own documentation advises: everything.
        name: ({"checkpointing": "full"}, [python, str(HERE / "peer_throughput.py"), name])
        for name, python in peers.items()
    }
    ordered = list(own.items())
    return dict([*ordered[:4], *others.items(), *ordered[4:]])


def measure(
    scale: Mapping[str, Any], peers: Mapping[str, str], output: Path | None, ends_at_s: float
) -> dict[str, Any]:
    """Run all cases until the time is over; the result so far is written after each."""
    measured: dict[str, Any] = {"measured": scale["dtype"] == "bfloat16", "complete": False, **machine(), "cases": {}}
    if not measured["measured"]:
        measured["note"] = "miniature on a CPU: not a measurement"
    measured |= {name: scale[name] for name in ("row_tokens", "document_tokens", "batch_rows", "steps")}
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCHMARK_FOLDER")) as name:
        folder = Path(name)
        request: dict[str, Any] = {"name": "device", "case": {}, "scale": dict(scale), "folder": name}
        facts = run_case(OWN_COMMAND, request, folder, CASE_LIMIT_S)
        measured |= {"device": facts}
        write(measured, output)
        if peers:
            command = [sys.executable, str(HERE / "peer_throughput.py"), "checkpoint"]
            measured["checkpoint_for_peers"] = run_case(
                command, {**request, "name": "checkpoint"}, folder, CASE_LIMIT_S
            )
        for name, (case, command) in commands(peers).items():
            left_s = ends_at_s - time.monotonic()
            if left_s < LEAST_S:
                measured["cases"][name] = {"settings": case, "fault": NOT_RUN}
                continue
            request |= {"name": name, "case": case}
            result = run_case(command, request, folder, min(CASE_LIMIT_S, left_s))
            result |= shares(result, case, scale, facts.get("matmul_flops", 0.0))
            measured["cases"][name] = {"settings": case, **result}
            write(measured, output)
            sys.stdout.write(f"{name}: {json.dumps(measured['cases'][name])}\n")
            sys.stdout.flush()
    measured["complete"] = not any(case.get("fault") == NOT_RUN for case in measured["cases"].values())
    if measured["measured"]:
        measured["goals_tokens_per_s_on_an_h200"] = GOALS
    write(measured, output)
    return measured


def write(result: Mapping[str, Any], output: Path | None) -> None:
    """Replace the result file by what is known so far."""
    if output is not None:
        partial = output.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        partial.replace(output)


def main() -> int:
    """Read the arguments and measure; fails when a case of ours has no figures."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--miniature", action="store_true")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    arguments = parser.parse_args()
    peers = dict(peer.split("=", 1) for peer in arguments.peer)
    if unknown := sorted(set(peers) - set(PEERS)):
        parser.error(f"unknown peer {', '.join(unknown)}; there are {', '.join(PEERS)}")

    import torch
    from throughput_work import FULL, MINIATURE

    if not arguments.miniature and not torch.cuda.is_available():
        parser.error("no CUDA device; --miniature runs the same code on a CPU, and measures nothing")
    output = arguments.output
    if output is None and not arguments.miniature:
        output = Path(__file__).with_suffix(".json")
    scale = MINIATURE if arguments.miniature else FULL
    result = measure(scale, peers, output, started + arguments.minutes * 60)
    own = [case for name, case in result["cases"].items() if name.startswith("ours")]
    return 0 if all("tokens_per_s" in case for case in own) else 1


if __name__ == "__main__":
    sys.exit(main())
