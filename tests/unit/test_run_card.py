"""The model card of a run: the head that the Hub reads, and a text that a registry can hold."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from run_files import facts_of, metrics, read, without, write_run

from finetune.errors import DataError
from finetune.io import read_json, write_json
from finetune.run_report.card import describe, markdown, render_card
from finetune.run_report.facts import RunFacts
from finetune.run_report.tables import Cell, table


@pytest.fixture
def facts(tmp_path: Path) -> RunFacts:
    return facts_of(tmp_path, metrics())


def test_the_card_needs_its_figures_too(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, without(metrics(), "evaluate", "tuned", "token_accuracy"))
    with pytest.raises(DataError, match=r"tuned\.token_accuracy is missing(.|\n)*--single-item evaluate"):
        render_card(facts, "m")


def test_the_card_is_one_that_the_hub_reads(facts: RunFacts) -> None:
    card = ModelCard(render_card(facts, "finetune-smoke"))
    head = card.data.to_dict()
    assert {key: head[key] for key in ("license", "license_name", "language", "datasets", "tags", "metrics")} == {
        "license": "other",
        "license_name": "of-base-and-data",
        "language": ["fr", "en"],
        "datasets": ["some/tweets"],
        "tags": ["smoke", "qlora", "gguf", "ollama"],
        "metrics": ["perplexity", "accuracy"],
    }
    assert "base_model" not in head
    results = [(each.metric_type, each.metric_value) for each in card.data.eval_results]
    assert results == [("perplexity", 29.84522), ("accuracy", 0.3611)]
    assert card.text.strip().startswith("# finetune-smoke")
    assert "| all test rows (2,080\u00a0tokens) | 65.65 → 29.85 | ×\u00a00.4546 (0.4313 to 0.4781) |" in card.text
    assert "- Prompts served as trained: **100.0\u00a0%**, 72 of 72 test chats" in card.text
    assert "| Function calls: simple | correct | 0.0\u00a0% (0.0\u00a0% to 10.0\u00a0%) | 62.5\u00a0%" in card.text


@pytest.mark.parametrize(
    ("licences", "base", "expected"),
    [
        (("MIT", "MIT"), "scratch", {"license": "mit"}),
        (("private", "private"), "scratch", {"license": "other", "license_name": "of-base-and-data"}),
        (
            ("MIT", "MIT"),
            "hub",
            {
                "license": "other",
                "license_name": "of-base-and-data",
                "license_link": "https://huggingface.co/some/base",
                "base_model": "some/base",
            },
        ),
    ],
)
def test_the_card_gives_a_licence_only_where_it_is_one(
    tmp_path: Path, licences: tuple[str, str], base: str, expected: dict[str, str]
) -> None:
    write_run(tmp_path, metrics())
    manifest = read_json(tmp_path / "data/raw/manifest.json")
    for source, licence in zip(manifest["sources"], licences, strict=True):
        source["license"] = licence
    write_json(tmp_path / "data/raw/manifest.json", manifest)
    write_json(tmp_path / "data/base_manifest.json", {"kind": base, "repo_id": "some/base", "revision": "e" * 40})
    head = ModelCard(render_card(read(tmp_path), "m")).data.to_dict()
    assert {key: head[key] for key in head if key.startswith(("license", "base"))} == expected


def test_an_evaluation_set_is_no_data_that_the_model_learned_from(tmp_path: Path) -> None:
    write_run(tmp_path, metrics())
    manifest = read_json(tmp_path / "data/raw/manifest.json")
    manifest["sources"][1]["use"] = "decontamination"
    write_json(tmp_path / "data/raw/manifest.json", manifest)
    head = ModelCard(render_card(read(tmp_path), "m")).data.to_dict()
    assert (head["license"], "datasets" in head) == ("mit", False)


def test_a_description_fits_the_registry_and_names_what_it_leaves_out(tmp_path: Path) -> None:
    numbers = metrics()
    both = numbers["evaluate"]["by_source"]["chat"]
    assert len(describe(facts_of(tmp_path, numbers), "m")) < 5000
    assert "Left out" not in describe(facts_of(tmp_path, numbers), "m")
    numbers["evaluate"]["by_source"] = {f"source_{index}": both for index in range(40)}
    text = describe(facts_of(tmp_path, numbers), "m")
    assert len(text) <= 5000
    assert "Left out here for their length: base beside tuned. The run's report/run.html holds all." in text
    assert "source_1" not in text
    # Cells are widened for MLflow, commands are not.
    assert "| Q8_0\u00a0\u00a0 | 1.64" in text
    assert f'    echo "{"81" * 32}  models/gguf/model-Q8_0.gguf" | sha256sum --check\n' in text


def test_a_text_in_a_table_of_the_card_stays_in_its_cell() -> None:
    content = table(("a", "b"), [[Cell("x|y\nz", "<b>*[l](u)", True), "\\"]])
    assert markdown(content) == "| a | b |\n|---|---|\n| x\\|y z ✓ (&lt;b>\\*\\[l](u)) | \\\\ |\n"
