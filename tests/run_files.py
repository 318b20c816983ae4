"""The files of a finished run, small and by hand: what the report, the card and the register stage read."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

from finetune.io import write_csv, write_json, write_jsonl, write_text
from finetune.lineage import Outputs
from finetune.params import load_params
from finetune.run_report.facts import RUN_CARD_FILE, SPEED_FILE, RunFacts, read_facts

RECIPE = Path(__file__).parents[1] / "recipes/smoke/params.yaml"
LOG_COLUMNS = ("step", "train_loss", "validation_loss", "learning_rate", "gradient_norm", "trained_tokens")
SCORE_COLUMNS = ("source", "rows_sha256", "tokens", "bytes", "base_nats", "tuned_nats")
TAGS = {
    "git.commit": "12" * 20,
    "git.dirty": "false",
    "python": "3.11.7",
    "package.torch": "2.13.0",
    "dvc_lock_sha256": "d" * 64,
    **{f"{name}_sha256": name[0] * 64 for name in ("data", "base", "adapter", "merged", "gguf", "ollama", "content")},
}
HOSTILE = "<script>alert('é')</script>\x00</pre><img src=http://evil.example/x onerror=alert(1)>\u202eabc"


def score(perplexity: float, accuracy: float, tokens: int) -> dict[str, float]:
    return {
        "perplexity": perplexity,
        "bits_per_byte": 1.234,
        "token_accuracy": accuracy,
        "tokens": tokens,
        "bytes": 4 * tokens,
    }


def quantised(ratio: float, kl: float, same: float, size_bytes: int, sha256: str) -> dict[str, Any]:
    figures = {"perplexity_ratio": ratio, "mean_kl": kl, "top1_agreement": same, "size_bytes": size_bytes}
    kinds = {"F32": 5, "Q8_0": 15}
    task = {"labels.support": {"answers": 8, "accuracy": 0.5, "accuracy_interval": {"low": 0.25, "high": 0.75}}}
    measured = {**score(30.0, 0.36, 2080), **figures, "sha256": sha256 * 32}
    return {**measured, "tensor_types": kinds, "fallback_tensors": 0, "tasks": task}


METRICS: dict[str, Any] = {
    "fetch": {"files": 2, "size_bytes": 300},
    "clean": {
        "rows_in": 1848,
        "kept": 1700,
        "dropped": {"retweet": 100, "link_only": 20},
        "duplicates": 15,
        "near_duplicates": 9,
        "quarantined": {"broken_json": 4},
        "languages": {"en": 300, "fr": 1400},
        "sources": {"chat": {"rows_in": 848, "kept": 800}, "tweets": {"rows_in": 1000, "kept": 900}},
    },
    "split": {
        "splits": {
            "train": {"rows": 1500, "tokens": 40000, "trained_tokens": 32100},
            "validation": {"rows": 90},
            "test": {"rows": 110},
        },
        "mix": {
            "tokens": 40000,
            "trained_tokens": 32100,
            "sources": {
                "chat": {"rows": 700, "tokens": 30000, "obtained_share": 0.75},
                "tweets": {"rows": 800, "tokens": 10000, "obtained_share": 0.25},
            },
        },
    },
    "base": {"parameters": 1574144},
    "train_qlora": {
        "steps": 365,
        "train_loss": 2.227247,
        "validation_loss": 3.7814357,
        "trainable_parameters": 262144,
        "trained_tokens": 77170,
    },
    "evaluate": {
        "base": score(65.64913, 0.2404, 2080),
        "tuned": score(29.84522, 0.3611, 2080),
        "perplexity_ratio": 0.454617,
        "perplexity_ratio_interval": {"low": 0.43125, "high": 0.4781},
        "by_source": {
            "chat": {
                "base": score(80.0, 0.2, 1000),
                "tuned": score(40.0, 0.3, 1000),
                "perplexity_ratio": 0.5,
                "perplexity_ratio_interval": {"low": 0.4, "high": 0.6},
            },
            "tweets": {"base": score(42.0, 0.24, 1080), "tuned": score(44.1, 0.375, 1080)},
        },
        "tasks": {
            "tool_calls.simple": {
                name: {"questions": 400, "correct": share, "correct_interval": {"low": share, "high": share + 0.1}}
                for name, share in (("base", 0.0), ("tuned", 0.625))
            },
            "labels.support": {"base": {"answers": 8, "accuracy": 0.25}, "tuned": {"answers": 8, "accuracy": 0.5}},
            "style.tweets": {
                name: {"answers": 8, "mean_characters": 123.456, "vocabulary_distance": 0.4321, "emoji_share": 0.125}
                for name in ("base", "tuned", "held_out")
            },
            "memorization": {name: {"answers": 24, "copied": 1, "share": 1 / 24} for name in ("base", "tuned")},
        },
    },
    "merge": {
        "tensors": 20,
        "changed_tensors": 14,
        "new_tokens": 0,
        "max_logit_difference": 0.020900964,
        "size_bytes": 3150440,
        "onto": "original",
        "compare": {
            "original": {"mean_kl": 0.00123, "top1_agreement": 0.9876},
            "dequantized": {"mean_kl": 0.000456, "top1_agreement": 0.9912},
        },
    },
    "quantize_gguf": {
        "merged_perplexity": 29.91936,
        "merged": score(29.91936, 0.3587, 2080),
        "types": {
            "F16": quantised(1.0, 0.0, 1.0, 3197184, "f1"),
            "Q4_K_M": quantised(1.00159, 0.001587, 0.9716, 1079808, "41"),
            "Q8_0": quantised(1.00053, 0.0000793, 0.99375, 1722624, "81"),
        },
    },
    "ollama_modelfile": {
        "chats": 72,
        "parity": 1.0,
        "add_bos": False,
        "num_ctx": 1024,
        "stops": ["</s>"],
        "roles": ["system", "user", "assistant", "tool"],
        "renderer": "go",
        "tools": True,
    },
}
SPEED = {
    name: {
        "prompt_tokens_per_s": 1234.5,
        "new_tokens_per_s": 98.7,
        "peak_rss_mib": 212.5,
        "sha256": sha256 * 32,
        "machine": "Test CPU, 2 thread(s)",
    }
    for name, sha256 in (("F16", "f1"), ("Q8_0", "81"), ("Q4_K_M", "00"))
}
RUN_CARD: dict[str, Any] = {
    "hardware": {
        "system": "Linux x86_64",
        "cpu": {"model": "Test CPU", "physical_cores": 8, "usable_threads": 16},
        "memory_bytes": 128 << 30,
        "gpus": [
            {
                "name": "Test GPU",
                "memory_bytes": 139 << 30,
                "compute_capability": "9.0",
                "peak_allocated_bytes": 61 << 30,
            }
        ],
        "driver": "570.1",
        "cuda": "13.0",
    },
    "libraries": {"python": "3.11.7", "torch": "2.13.0"},
    "environment": {},
    "seed": 42,
    "sha256": {"adapter": "a" * 64, "split": "b" * 64},
    "started": "2026-01-02T03:04:05+00:00",
    "ended": "2026-01-02T04:04:05+00:00",
    "steps": 365,
    "trained_tokens": 77170,
    "skipped_steps": 2,
    "processes": 1,
    "micro_batch_rows": 8,
    "attention": "varlen",
    "deterministic": True,
    "device": "cuda",
    "seconds": 3598.4,
    "resumes": 3,
    "tokens_per_s": 12543.2,
    "energy_wh": 612.345,
    "telemetry": {
        "gpu_0_power_usage_watts": {"mean": 613.2, "p95": 690.0, "max": 701.4},
        "tokens_per_second": {"mean": 12540.0, "p95": 12900.0, "max": 13001.0},
    },
    "git_commit": "12" * 20,
    "git_dirty": "true",
}


def metrics() -> dict[str, Any]:
    """A copy of METRICS, to be changed."""
    return copy.deepcopy(METRICS)


def write_run(root: Path, numbers: dict[str, Any]) -> None:
    """Everything below `root` that a finished run leaves, but for models/base and models/merged."""
    for name in ("adapter/adapter.bin", "gguf/model-Q8_0.gguf", "ollama/Modelfile", "ollama/template.gotmpl"):
        write_text(root / "models" / name, name)
    file = {"path": "chat/a.txt", "sha256": "ab" * 32, "size_bytes": 7}
    place = {"format": "chatml", "revision": None, "files": [file]}
    chat = {"name": "chat", "use": "training", "license": "MIT", "origin": "local:*.txt", **place}
    tweets = {**chat, "name": "tweets", "license": "CC-BY-4.0", "origin": "hub:some/tweets/*", "revision": "c" * 40}
    write_json(root / "data/raw/manifest.json", {"sources": [chat, tweets]})
    write_json(root / "data/base_manifest.json", {"kind": "scratch"})
    sample = {"source": "chat", "prompt": f"Bonjour {HOSTILE}", "reference": "Oui.", "base": "", "tuned": HOSTILE}
    write_jsonl(root / "data/evaluation/samples.jsonl", [sample])
    scores = [("chat", f"{number:02x}" * 32, 20, 80, 90.0, 60.0 + number) for number in range(30)]
    write_csv(root / "data/evaluation/test_scores.csv", SCORE_COLUMNS, scores)
    answers = {"F16": HOSTILE, "Q8_0": "Oui, bien sûr."}
    row = {key: sample[key] for key in ("source", "prompt", "reference")}
    write_jsonl(root / "data/quantization/samples.jsonl", [{**row, "answers": answers}])
    write_text(root / "data/report/index.html", "<p>data</p>\n")
    for name, content in numbers.items():
        write_json(root / f"metrics/{name}.json", content)
    rows = [[step, 4.0 / step, "" if step % 2 else 3.0 / step, 0.001, 1.0, 10 * step] for step in (1, 2, 3, 4)]
    write_csv(root / "plots/train_log.csv", LOG_COLUMNS, rows)
    pareto = [("F16", "yes"), ("Q8_0", "yes"), ("Q4_K_M", "no")]
    write_csv(root / "plots/quantization.csv", ("type", "pareto"), pareto)
    write_json(root / SPEED_FILE, SPEED)
    write_json(root / RUN_CARD_FILE, RUN_CARD)
    write_text(root / "dvc.lock", "schema: '2.0'\nstages:\n  fetch: {cmd: x}\n")
    write_text(root / "dvc.yaml", "stages: {}\n")
    shutil.copy(RECIPE, root / "params.yaml")


def without(numbers: dict[str, Any], *keys: str) -> dict[str, Any]:
    inner = numbers
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    return numbers


def outputs_of(root: Path) -> Outputs:
    made, data = root / "models", root / "data"
    folders = (made / name for name in ("adapter", "merged", "gguf", "ollama", "base"))
    manifests = (data / "base_manifest.json", data / "raw/manifest.json")
    return Outputs(*folders, *manifests, root / "metrics", root / "plots", root / "dvc.lock")


def register_argv(root: Path) -> list[Path]:
    """The arguments of the register stage, in the order of dvc.yaml, for a run of `write_run`."""
    made, data = root / "models", root / "data"
    return [
        *(made / name for name in ("adapter", "merged", "gguf", "ollama")),
        root / "params.yaml",
        made / "registered.json",
        made / "base",
        data / "base_manifest.json",
        data / "raw/manifest.json",
        root / "metrics",
        root / "plots",
        data / "evaluation",
        data / "quantization/samples.jsonl",
        data / "report",
        root / "dvc.lock",
        root / "dvc.yaml",
    ]


def facts_of(root: Path, numbers: dict[str, Any], **tags: str) -> RunFacts:
    write_run(root, numbers)
    return read(root, **tags)


def read(root: Path, **tags: str) -> RunFacts:
    files = {
        "samples": root / "data/evaluation/samples.jsonl",
        "quantized_samples": root / "data/quantization/samples.jsonl",
        "speed": root / SPEED_FILE,
        "run_card": root / RUN_CARD_FILE,
    }
    return read_facts(outputs_of(root), load_params(root / "params.yaml"), tags={**TAGS, **tags}, **files)
