"""recipes/README.md says what params.yaml can say: every key, format, policy and reason; what it shows is valid."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from pipeline_files import ROOT, SOURCE
from ruamel.yaml import YAML

from finetune import data_sections, mix_sections, source_sections
from finetune.params import Params

PAGE = ROOT / "recipes/README.md"
RECIPES = sorted(file.parent.name for file in ROOT.glob("recipes/*/params.yaml"))
SECTIONS = (
    source_sections.Source,
    source_sections.LocalOrigin,
    source_sections.HubOrigin,
    source_sections.HubStreamOrigin,
    source_sections.Filter,
    data_sections.Clean,
    data_sections.Languages,
    data_sections.NearDuplicates,
    data_sections.Decontamination,
    data_sections.NewToken,
    data_sections.Tokenize,
    data_sections.Split,
    mix_sections.Mix,
)
# Keys whose values are names to choose among.
CHOICES = (
    (source_sections.Source, "format"),
    (source_sections.Source, "use"),
    (data_sections.NewToken, "place"),
    (data_sections.Tokenize, "over_length"),
    (data_sections.Tokenize, "loss"),
    (mix_sections.Mix, "unit"),
    (mix_sections.Mix, "on_exhausted"),
)
# Calls that name why a row is no record.
NAMING = {"UnreadableRowError", "UnwantedRowError", "Fault", "Skipped", "fault", "blame", "too_long"}
FILTERS = SOURCE / "finetune/data/cleaning/filters.py"


def words() -> set[str]:
    """Every word of the page that stands in code."""
    return set(re.findall(r"\w+", " ".join(re.findall(r"```.*?```|`[^`]+`", PAGE.read_text(encoding="utf-8"), re.S))))


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_key_is_on_the_page(section: Any) -> None:
    assert sorted(set(section.model_fields) - words()) == []


@pytest.mark.parametrize(("section", "key"), CHOICES)
def test_every_choice_is_on_the_page(section: Any, key: str) -> None:
    assert sorted(set(get_args(section.model_fields[key].annotation)) - words()) == []


def test_every_field_of_a_format_is_on_the_page() -> None:
    fields = {field for names in source_sections.FIELDS.values() for field in names}
    assert sorted(fields - words()) == []


def reasons(file: Path) -> set[str]:
    """The reasons that a module gives as literals: in those calls, `reason=`, `dropped[...]`, or what filters give."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        given: list[ast.AST] = []
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in NAMING:
            given = [part for argument in node.args for part in (argument, *ast.iter_child_nodes(argument))]
        elif isinstance(node, ast.keyword) and node.arg == "reason":
            given = [node.value]
        elif isinstance(node, ast.Subscript) and getattr(node.value, "attr", "") == "dropped":
            given = [node.slice]
        elif isinstance(node, ast.Return) and file == FILTERS and node.value:
            given = [node.value]
        texts = [part.value for part in given if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        found |= {text for text in texts if re.fullmatch(r"[a-z]+(_[a-z0-9]+)*|utf16", text)}
    return found


def test_every_reason_is_on_the_page() -> None:
    found = set().union(*(reasons(file) for file in (SOURCE / "finetune/data").rglob("*.py")))
    assert {"broken_json", "orphan_message", "not_best_path", "conversation_too_long", "retweet", "utf16"} <= found
    assert {"special_token_in_text", "no_trained_token_left"} <= found
    assert sorted(found - words()) == []


def test_every_recipe_is_in_the_table() -> None:
    linked = re.findall(r"^\| \[(\w+)\]\(\1/README\.md\) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(linked) == RECIPES


def merged(whole: Any, part: Any) -> Any:
    """`whole` with what `part` changes; a mapping of another kind or strategy replaces the one before."""
    if not isinstance(whole, dict) or not isinstance(part, dict):
        return part
    if any(part.get(key) not in (None, whole.get(key)) for key in ("kind", "strategy")):
        return part
    return {**whole, **{key: merged(whole.get(key), value) for key, value in part.items()}}


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
def test_the_settings_that_are_shown_are_valid(block: str) -> None:
    yaml = YAML(typ="safe", pure=True)
    whole = yaml.load((ROOT / "recipes/smoke/params.yaml").read_text(encoding="utf-8"))
    Params.model_validate(merged(whole, yaml.load(block)))
