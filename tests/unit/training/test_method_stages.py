"""The stages behind training, on what a full fine-tuning and an adapter with whole tables leave: evaluate and merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from tiny_methods import logits, train_and_save
from tiny_training import CPU
from training_settings import PLAIN, make_lora, make_settings

from finetune.errors import DataError, ExportError
from finetune.evaluation.perplexity import Score, model_logits, score
from finetune.export.merge import reload
from finetune.io import read_json, read_jsonl, sha256_tree
from finetune.sections import Evaluate, Merge, ToolCalls
from finetune.stages import evaluate, merge
from finetune.training.model import load_base

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + eos_token }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)
METHODS = {
    "full": make_settings(method="full", lora=None, quantization=PLAIN, epochs=1, learning_rate=0.003),
    "whole tables": make_settings(quantization=PLAIN, epochs=1, lora=make_lora(modules_to_save=["lm_head", "norm"])),
}
BASES = ["tiny_base", "untied_base", "conv1d_base"]
ROWS = [
    {"id": "b", "source": "x", "group": "1", "input_ids": [1, 5, 6, 7, 2], "trained": [False, False, True, True, True]},
    {"id": "a", "source": "y", "group": "2", "input_ids": [1, 9, 8, 2], "trained": [False, True, True, True]},
]


@pytest.fixture
def inputs(tiny_tokenizer: Any, tmp_path: Path) -> dict[str, Path]:
    words, split = tmp_path / "tokenizer", tmp_path / "split"
    tiny_tokenizer.save_pretrained(words)
    (words / "training_template.jinja").write_text(TEMPLATE)
    serving = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    (words / "chat_template.jinja").write_text(serving)
    split.mkdir()
    for name in ("train", "test"):
        parquet.write_table(pa.Table.from_pylist(ROWS), split / f"{name}.parquet")
    return {"tokenizer": words, "split": split}


def evaluated(base: Path, folder: Path, inputs: dict[str, Path], use: Any) -> dict[str, Any]:
    section = Evaluate(
        samples_per_source=2,
        answers_per_task=2,
        max_new_tokens=4,
        bootstrap_resamples=100,
        memorization_tokens=3,
        tool_calls=ToolCalls(folder="nowhere", sets=[]),
        style_sources=[],
        labels={},
    )
    outs = (folder / "evaluation", folder / "evaluate.json", folder / "perplexity.csv", folder / "ratio.csv")
    paths = (inputs["split"], inputs["tokenizer"], base, folder / "trained", *outs)
    evaluate.run(*paths, seed=1, cpu_threads=1, evaluate=section, train_qlora=use)
    numbers: dict[str, Any] = read_json(folder / "evaluate.json")
    return numbers


def merged(base: Path, folder: Path, inputs: dict[str, Path], **changes: Any) -> dict[str, Any]:
    section = {"onto": "original", "dtype": "float32", "compare_dtype": "float32", "max_logit_difference": 1e-4}
    paths = (folder / "trained", base, inputs["tokenizer"], inputs["split"], folder / "merged", folder / "merge.json")
    merge.run(*paths, seed=1, cpu_threads=1, merge=Merge(**{**section, "compare_rows": 2, **changes}))
    numbers: dict[str, Any] = read_json(folder / "merge.json")
    return numbers


def perplexity(model: Any) -> float:
    logits_of = model_logits(model.eval())
    scores = [score(logits_of(row["input_ids"]), row["input_ids"], row["trained"]) for row in ROWS]
    return sum(scores, Score()).summary()["perplexity"]


@pytest.mark.parametrize(("which", "method"), [*((base, "full") for base in BASES), ("tiny_base", "whole tables")])
def test_base_and_tuned_are_judged_side_by_side_and_merged(
    which: str,
    method: str,
    request: pytest.FixtureRequest,
    tiny_tokenizer: Any,
    tmp_path: Path,
    inputs: dict[str, Path],
) -> None:
    base, use = request.getfixturevalue(which), METHODS[method]
    model = train_and_save(base, tiny_tokenizer, tmp_path, use)
    numbers = evaluated(base, tmp_path, inputs, use)
    bare, tuned = perplexity(load_base(base, None, torch.float32, CPU)), perplexity(model)
    assert numbers["base"]["perplexity"] == bare
    assert numbers["tuned"]["perplexity"] == tuned
    assert abs(bare - tuned) > 0.1
    assert [set(row) for row in read_jsonl(tmp_path / "evaluation/samples.jsonl")] == [
        {"source", "prompt", "reference", "base", "tuned"}
    ] * 2

    figures = merged(base, tmp_path, inputs)
    assert "compare" not in figures
    assert figures["max_logit_difference"] < 1e-5
    assert torch.allclose(logits(reload(tmp_path / "merged", torch.float32)), logits(model), atol=1e-5)


def test_a_full_model_gives_the_same_bytes_again_and_no_other_bases(
    tiny_base: Path, untied_base: Path, tiny_tokenizer: Any, tmp_path: Path, inputs: dict[str, Path]
) -> None:
    use = METHODS["full"]
    for name in ("one", "two"):
        train_and_save(tiny_base, tiny_tokenizer, tmp_path / name, use)
        merged(tiny_base, tmp_path / name, inputs, dtype="bfloat16", max_logit_difference=0.2)
    assert sha256_tree(tmp_path / "one/trained") == sha256_tree(tmp_path / "two/trained")
    assert sha256_tree(tmp_path / "one/merged") == sha256_tree(tmp_path / "two/merged")
    with pytest.raises(DataError, match="trained on another base than this one"):
        merged(untied_base, tmp_path / "one", inputs)
    with pytest.raises(DataError, match="trained on another base than this one"):
        evaluated(untied_base, tmp_path / "one", inputs, use)
    with pytest.raises(ExportError, match="no layer of the base was 4-bit in training"):
        merged(tiny_base, tmp_path / "one", inputs, onto="dequantized")
    with pytest.raises(ExportError, match=r"differ from base \+ adapter by 0\.0\d+, more than 1e-06"):
        merged(tiny_base, tmp_path / "two", inputs, dtype="bfloat16", max_logit_difference=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_cut_ends_in_the_same_bytes(
    method: str, tiny_base: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    class PowerCutError(Exception):
        pass

    def cut_at_4(step: int, _tokens: int) -> None:
        if step == 4:
            raise PowerCutError

    use = METHODS[method]
    train_and_save(tiny_base, tiny_tokenizer, tmp_path / "whole", use)
    with pytest.raises(PowerCutError):
        train_and_save(tiny_base, tiny_tokenizer, tmp_path / "cut", use, seen=cut_at_4)
    assert not (tmp_path / "cut/trained").exists()
    train_and_save(tiny_base, tiny_tokenizer, tmp_path / "cut", use)
    assert sha256_tree(tmp_path / "cut/trained") == sha256_tree(tmp_path / "whole/trained")
