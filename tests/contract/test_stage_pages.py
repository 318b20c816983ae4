"""docs/stages has a page for each stage, and says of it what params.yaml, dvc.yaml, the metrics and the code say."""

from __future__ import annotations

import json
import re

import pytest
from pipeline_files import ROOT, SOURCE, stages
from stage_tables import (
    FOLDER,
    between,
    common_parameters,
    covers,
    metric_keys,
    others_read,
    page,
    parameters,
    reads_and_writes,
)
from test_docs import has_test

STAGES = sorted(stages())
# A row of a key that the files of this repository lack begins with these words.
ONLY = ("Only ", "Empty ")


def test_every_stage_has_a_page_and_every_page_a_stage() -> None:
    assert sorted(file.stem for file in FOLDER.glob("*.md")) == sorted([*STAGES, "README"])
    listed = re.findall(r"^\| \[`(\w+)`\]\(\1\.md\) \| (.*?) \|", (FOLDER / "README.md").read_text("utf-8"), re.M)
    assert [name for name, _ in listed] == list(stages())


@pytest.mark.parametrize("stage", STAGES)
def test_a_page_begins_with_what_dvc_says_of_the_stage(stage: str) -> None:
    text = " ".join(page(stage).split())
    assert text.startswith(f"# {stage} {stages()[stage]['desc'][0].upper()}{stages()[stage]['desc'][1:]}.")


@pytest.mark.parametrize("stage", STAGES)
def test_a_page_names_every_file_that_goes_in_and_out(stage: str) -> None:
    (cells,) = between(page(stage), "files")
    read, written = (re.findall(r"`([^`]+)`", cell) for cell in cells)
    assert (read, written) == reads_and_writes(stage)


@pytest.mark.parametrize("stage", STAGES)
def test_a_page_has_every_parameter_with_its_bounds(stage: str) -> None:
    rows = between(page(stage), "parameters")
    wanted = parameters(stage)
    shown = {key.strip("`"): value for key, value, _ in rows}
    lines = "\n".join(f"| `{key}` | {value} | ... |" for key, value in wanted.items() if shown.get(key) != value)
    assert list(shown.items()) == list(wanted.items()), f"docs/stages/{stage}.md, in this order:\n{lines}"
    assert [key for key, _, meaning in rows if len(meaning) < 10 or "..." in meaning] == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_page_says_what_else_runs_the_stage_again(stage: str) -> None:
    found = re.search(r"^Of other parameters it reads: (.*)\.$", page(stage), re.MULTILINE)
    assert found is not None
    named = [] if found[1] == "none" else re.findall(r"`([^`]+)`", found[1])
    assert named == others_read(stage)


@pytest.mark.parametrize("stage", [name for name in STAGES if name != "register"])
def test_a_page_explains_every_figure(stage: str) -> None:
    keys = set(metric_keys(json.loads((ROOT / f"metrics/{stage}.json").read_text(encoding="utf-8"))))
    rows = [(re.findall(r"`([^`]+)`", names), meaning) for names, meaning in between(page(stage), "metrics")]
    patterns = [name for names, _ in rows for name in names]
    unexplained = sorted(key for key in keys if not any(covers(pattern, key) for pattern in patterns))
    assert unexplained == [], f"docs/stages/{stage}.md: rows for these keys"
    unknown = [
        name
        for names, meaning in rows
        if not meaning.startswith(ONLY)
        for name in names
        if not any(covers(name, key) for key in keys)
    ]
    assert unknown == [], f"docs/stages/{stage}.md: metrics/{stage}.json has no such key"
    assert [names for names, meaning in rows if len(meaning) < 8] == []


@pytest.mark.parametrize("stage", STAGES)
def test_every_guarantee_stands_on_a_test(stage: str) -> None:
    rows = between(page(stage), "guarantees")
    assert len(rows) >= 3
    for promise, cell in rows:
        tests = re.findall(r"`(test_\w+)`", cell)
        assert tests, promise
        assert [name for name in tests if not has_test(name)] == []


def sources() -> str:
    files = [*(ROOT / "scripts").glob("*.py"), *SOURCE.rglob("*.py")]
    return "".join(file.read_text(encoding="utf-8") for file in files)


@pytest.mark.parametrize("stage", STAGES)
def test_every_error_is_one_that_the_code_gives(stage: str) -> None:
    rows = between(page(stage), "errors")
    code = sources()
    assert len(rows) >= 2
    assert [message for message, _ in rows if message.strip("`") not in code] == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_page_shows_how_to_run_the_stage_alone(stage: str) -> None:
    assert f"```sh\n. .venv/bin/activate\ndvc repro --single-item {stage}\n```" in page(stage)


def test_the_common_parameters_are_in_the_overview() -> None:
    rows = between((FOLDER / "README.md").read_text(encoding="utf-8"), "parameters")
    assert {key.strip("`"): value for key, value, _ in rows} == common_parameters()


def test_a_key_with_a_name_in_brackets_covers_any_name_and_nothing_deeper() -> None:
    assert covers("types.<type>.size_bytes", "types.Q8_0.size_bytes")
    assert not covers("types.<type>", "types.Q8_0.size_bytes")
    assert not covers("types.size_bytes", "types.Q8_0.size_bytes")
    assert list(metric_keys({"a": {"b": 1, "c": {}}, "d": [{"e": 1}, {"e": 2}], "f": []})) == [
        "a.b",
        "a.c.-",
        "d[].e",
        "d[].e",
        "f",
    ]
