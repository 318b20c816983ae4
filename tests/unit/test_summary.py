from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.errors import DataError
from finetune.io import write_bytes, write_json
from finetune.summary import summarize

METRICS: dict[str, Any] = {
    "clean": {"rows_in": 412, "kept": 371},
    "split": {
        "splits": {"train": {"rows": 300, "trained_tokens": 9876}, "validation": {"rows": 36}, "test": {"rows": 35}}
    },
    "train_qlora": {"steps": 60, "validation_loss": 1.23456},
    "evaluate": {
        "base": {"perplexity": 12.5},
        "tuned": {"perplexity": 5.0},
        "perplexity_ratio": 0.4,
        "perplexity_ratio_interval": {"low": 0.38, "high": 0.4213},
    },
    "merge": {"max_logit_difference": 0.0312},
    "quantize_gguf": {
        "types": {
            "Q8_0": {"perplexity_ratio": 1.0012, "top1_agreement": 0.996, "size_bytes": 1572864},
            "F16": {"perplexity_ratio": 1.0, "top1_agreement": 1.0, "size_bytes": 3145728},
        }
    },
    "ollama_modelfile": {"chats": 24, "parity": 1.0},
}
SIZES = {
    "data/clean/records.jsonl": 1048576,
    "data/report/index.html": 52429,
    "data/split/train.parquet": 524288,
    "data/split/test.parquet": 524288,
    "models/adapter/adapter.safetensors": 104858,
    "data/evaluation/samples.jsonl": 10,
    "models/merged/model.safetensors": 2097152,
    "models/gguf/model-Q8_0.gguf": 1572864,
    "models/gguf/model-F16.gguf": 3145728,
    "models/ollama/Modelfile": 100,
    "report/index.html": 209715,
}
EXPECTED = """\
what           where                          MiB  figures
{line}
records        data/clean/records.jsonl       1.0  371 kept of 412 rows
data page      data/report/index.html         0.1  why 41 rows were lost, the mix, 20 masks in colour
split          data/split                     1.0  300/36/35 rows train/validation/test, 9876 trained tokens
adapter        models/adapter                 0.1  60 steps, validation loss 1.235
base -> tuned  data/evaluation/samples.jsonl  0.0  test perplexity 12.50 -> 5.00, ratio 0.400 (95 %: 0.380 to 0.421)
merged model   models/merged                  2.0  logits within 0.031 of base + adapter
GGUF F16       models/gguf/model-F16.gguf     3.0  perplexity x 1.0000 of merged, same first choice 100.0%
GGUF Q8_0      models/gguf/model-Q8_0.gguf    1.5  perplexity x 1.0012 of merged, same first choice 99.6%
Modelfile      models/ollama/Modelfile        0.0  served = trained in 24/24 chats
registered     models/registered.json              finetune-smoke@challenger, content abcdefabcdef
report         report/index.html              0.2  all of this and more on one page, for a browser

ollama create finetune-smoke -f models/ollama/Modelfile  serve it with Ollama
make chat                                                talk to it here
make report                                              write the page of this run, report/index.html
make mlflow                                              look at the run and the registered version
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, numbers in METRICS.items():
        write_json(tmp_path / f"metrics/{name}.json", numbers)
    for name, size_bytes in SIZES.items():
        write_bytes(tmp_path / name, bytes(size_bytes))
    registered = {"model_name": "finetune-smoke", "alias": "challenger", "content_sha256": "abcdef" * 10}
    write_json(tmp_path / "models/registered.json", registered)
    return tmp_path


def test_the_table_and_the_commands(root: Path) -> None:
    assert summarize(root) == EXPECTED.format(line="-" * 116)


def test_a_ratio_without_an_interval_and_a_run_without_a_page(root: Path) -> None:
    evaluated = METRICS["evaluate"]
    write_json(
        root / "metrics/evaluate.json", {key: evaluated[key] for key in evaluated if not key.endswith("interval")}
    )
    (root / "report/index.html").unlink()
    table = summarize(root)
    assert "ratio 0.400\n" in table
    assert "\nreport " not in table
    assert "make report" in table


def test_a_missing_metrics_file_says_which_stage_makes_it(root: Path) -> None:
    (root / "metrics/evaluate.json").unlink()
    with pytest.raises(DataError, match=r"metrics/evaluate\.json(.|\n)*--single-item evaluate"):
        summarize(root)


def test_a_missing_file_is_an_error_not_a_zero(root: Path) -> None:
    (root / "models/gguf/model-F16.gguf").unlink()
    with pytest.raises(DataError, match=r"missing(.|\n)*model-F16\.gguf(.|\n)*dvc repro"):
        summarize(root)


def test_an_unregistered_model_is_an_error(root: Path) -> None:
    (root / "models/registered.json").unlink()
    with pytest.raises(DataError, match=r"registered\.json"):
        summarize(root)
