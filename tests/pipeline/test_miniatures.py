"""Every recipe, at miniature scale, from its files or a Hub on 127.0.0.1 to a Modelfile and a registered version."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from clone import ROOT, clone, git, repro, stages_run
from miniature import MAX_TOKENS, install, make, recipes
from recipe_data import hub_files, local_files

sys.path.insert(0, str(ROOT / "tests/unit/data"))
sys.path.insert(0, str(ROOT / "tests/security"))
from hub_server import TOKEN, State, serving
from secret_search import PLANTED, WORDS, leaks, shown

pytestmark = [pytest.mark.pipeline, pytest.mark.timeout(600)]
# Rows that are read, by source. A message tree counts its paths, and each message that is on none.
ROWS_IN = {
    "dolores_v5": {"dialogues": 120},
    "tweet_style": {"tweets": 199},
    "gpt2_guide": {"questions": 101},
    "lora_mix": {"ultrachat": 70, "hh_rlhf": 70, "oasst2": 214, "vigogne": 70, "xlam": 38, "glaive": 37},
    "french_sft": {"alpaca_gpt4": 59, "evol_instruct": 59, "sharegpt": 58, "ultralink": 58, "french_instruct": 58},
}
# Losses that the recipe's own filters and the damaged rows of its files must cause.
LOST = {
    "tweet_style": {"tweets": {"retweet": 12, "link_only": 5}},
    "gpt2_guide": {"questions": {"empty_assistant": 1}},
    "lora_mix": {"oasst2": {"filtered_lang": 4, "filtered_deleted": 70, "not_best_path": 70}},
}


# Most of a miniature's time goes into starting twelve programs one after the other.
RUNS_AT_ONCE = 2
SECRETS = {**WORDS, "HF_TOKEN": TOKEN, "origin of git": "planted-git-password"}
Runs = dict[str, Future[tuple[Path, str]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """The folder of each recipe's finished miniature, and what dvc printed; one Hub holds the files of all."""
    files: dict[str, dict[str, bytes]] = {}
    for recipe in recipes():
        for repo, content in hub_files(recipe).items():
            files.setdefault(repo, {}).update(content)
    for hub in serving(files):
        hub.gated.add("datasets/Salesforce/xlam-function-calling-60k")
        for recipe in recipes():
            text = (ROOT / f"recipes/{recipe}/params.yaml").read_text(encoding="utf-8")
            hub.commits.update({commit: commit for commit in re.findall("[0-9a-f]{40}", text)})
        with ThreadPoolExecutor(RUNS_AT_ONCE) as pool:
            yield {
                recipe: pool.submit(run_miniature, recipe, tmp_path_factory.mktemp(recipe), hub) for recipe in recipes()
            }


def run_miniature(recipe: str, folder: Path, hub: State) -> tuple[Path, str]:
    """Make, pin and run a miniature in a clone."""
    copy = clone(folder / recipe)
    install(copy, recipe, hub.url, local_files(recipe))
    git(copy, "remote", "add", "origin", f"https://ann:{SECRETS['origin of git']}@127.0.0.1:9/team/models.git")
    return copy, repro(copy, HF_ENDPOINT=hub.url, HF_HOME=str(folder / "hf"), HF_TOKEN=TOKEN, **PLANTED)


def metrics(folder: Path, stage: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / f"metrics/{stage}.json").read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize("recipe", recipes())
def test_recipe_ends_with_a_modelfile_and_a_registered_version(recipe: str, runs: Runs) -> None:
    folder, output = runs[recipe].result()
    assert len(stages_run(output)) == 12
    assert (folder / "models/ollama/Modelfile").read_text(encoding="utf-8").startswith("FROM ")
    assert metrics(folder, "ollama_modelfile")["parity"] == 1.0
    registered = json.loads((folder / "models/registered.json").read_text(encoding="utf-8"))
    assert registered["alias"] == "challenger"
    clean = metrics(folder, "clean")
    rows_in = {source: counts["rows_in"] for source, counts in clean["sources"].items() if source in ROWS_IN[recipe]}
    assert rows_in == ROWS_IN[recipe]
    for source, reasons in LOST.get(recipe, {}).items():
        losses = clean["sources"][source]["dropped"] | clean["sources"][source]["quarantined"]
        assert reasons.items() <= losses.items()
    for counts in clean["sources"].values():
        lost = sum(counts["dropped"].values()) + sum(counts["quarantined"].values())
        assert counts["rows_in"] == counts["kept"] + lost + counts["duplicates"] + counts["near_duplicates"] > 0
    check_mix(folder)
    assert (folder / "data/report/index.html").stat().st_size > 0


@pytest.mark.parametrize("recipe", recipes())
def test_no_secret_is_in_anything_that_a_run_wrote_or_printed(recipe: str, runs: Runs) -> None:
    folder, output = runs[recipe].result()
    for target in ("report", "summary"):
        done = make(folder, target, HF_TOKEN=TOKEN, **PLANTED)
        assert done.returncode == 0, done.stderr
        output += done.stdout + done.stderr
    assert shown(output, SECRETS) == []
    written = [path for path in folder.rglob("*") if path.is_file()]
    endings = {path.suffix for path in written}
    assert {".gguf", ".safetensors", ".html", ".db", ".lock", ".csv", ".jsonl", ".parquet"} <= endings
    assert any("checkpoints" in path.parts for path in written)
    assert any("mlartifacts" in path.parts for path in written)
    # Git keeps the address that a person gave it, and the tests hold what they plant.
    assert leaks(folder.parent, SECRETS, but=[f"{recipe}/.git", f"{recipe}/tests"]) == []


def check_mix(folder: Path) -> None:
    """Shares that the recipe asks for are obtained, within one of the longest records."""
    split = metrics(folder, "split")
    mix = split["mix"]
    whole = mix[mix["unit"]] if mix["unit"] else 0
    record = 1 if mix["unit"] == "rows" else MAX_TOKENS
    for source, entry in mix["sources"].items():
        if entry["requested_share"] is not None:
            assert entry["obtained_share"] == pytest.approx(entry["requested_share"], abs=record / whole), source
