"""The model card of a run: the head that the Hub reads, and a text that a registry can hold."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from run_files import facts_of, metrics, read, without, write_run

from finetune.errors import DataError
from finetune.io import read_json, write_json
from finetune.run_report.card import markdown, render_card
from finetune.run_report.facts import RunFacts
from finetune.run_report.tables import Cell, table
from finetune.run_report.version_page import MAX_DESCRIPTION_CHARACTERS, Registered, describe, describe_model

BESIDE = Registered("3", "upload", "Better: perplexity × 0.9000 of version 2.")


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
    numbers["evaluate"]["by_source"] = {f"source_{index}": both for index in range(40)}
    text = describe(facts_of(tmp_path, numbers), "m", BESIDE)
    assert len(text) <= MAX_DESCRIPTION_CHARACTERS
    assert "Left out here for their length: base beside tuned" in text
    assert "The run's report/run.html holds all." in text
    assert "source_1" not in text
    # Cells are widened for MLflow, commands are not.
    assert "| Q8_0\u00a0\u00a0 | 1.64" in text
    assert f'    echo "{"81" * 32}  models/gguf/model-Q8_0.gguf" | sha256sum --check\n' in text


def test_the_page_of_a_version_answers_what_it_is_how_good_and_what_to_type(facts: RunFacts) -> None:
    text = describe(facts, "m", BESIDE)
    first, _, rest = text.partition("\n\n")
    # All that a list of versions shows.
    assert first == (
        "×\u00a00.4546 perplexity of its base on held-out answers; better: 95 % interval 0.4313 to 0.4781."
    )
    order = ["Recipe `smoke`: QLoRA", "## Beside the champion", "## Use it", "## Where it comes from"]
    order += ["## Make it again", "## Learned from", "## Base beside tuned"]
    found = [rest.index(title) for title in order]
    assert found == sorted(found)
    for told in (
        "Better: perplexity × 0.9000 of version 2.\n",
        "    make pull NAME=m/3\n",
        "    python -m mlflow models serve -m models:/m/3 --env-manager local --port 5001\n",
        "    make rebuild VERSION=m/3\n",
        f"| git commit\u00a0\u00a0 | {'12' * 20} |",
        f"| data\u00a0\u00a0 | SHA-256 {'d' * 64} |",
        f"| base\u00a0\u00a0 | made from scratch, SHA-256 {'b' * 64} |",
    ):
        assert told in text


@pytest.mark.parametrize(("mode", "served"), [("upload", True), ("serving", True), ("reference", False)])
def test_only_a_version_that_mlflow_can_serve_is_said_to_be(facts: RunFacts, mode: str, served: bool) -> None:
    text = describe(facts, "m", Registered("1", mode, "x"))
    assert ("mlflow models serve" in text, f"(mode `{mode}`)" in text) == (served, True)


def test_the_page_of_a_model_tells_the_aliases_and_what_to_type() -> None:
    text = describe_model("m", "smoke")
    assert text.startswith("**m** is fine-tuned by the recipe `smoke`.")
    for told in ("| challenger", "| champion", "| previous_champion", "    make promote NAME=m\n"):
        assert told in text


def test_a_text_in_a_table_of_the_card_stays_in_its_cell() -> None:
    content = table(("a", "b"), [[Cell("x|y\nz", "<b>*[l](u)", True), "\\"]])
    assert markdown(content) == "| a | b |\n|---|---|\n| x\\|y z ✓ (&lt;b>\\*\\[l](u)) | \\\\ |\n"
