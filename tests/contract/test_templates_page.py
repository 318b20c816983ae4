"""docs/templates.md shows the matrix that the tests compute: template x kind of chat x engine, and each refusal."""

from __future__ import annotations

import json
import re
from typing import Any, get_args

import pytest
from pipeline_files import ROOT
from ruamel.yaml import YAML

from finetune.chat_template import has_generation_tags
from finetune.params import Params
from finetune.sections import OllamaModelfile

PAGE = ROOT / "docs/templates.md"
# Held to what is computed by test_template_library.py::test_the_matrix_is_what_is_computed.
MATRIX = ROOT / "tests/unit/export/template_matrix.json"
LIBRARY = ROOT / "chat_templates"
KINDS = ("plain", "system", "multi-turn", "tools", "tool results", "unusual text")
CELLS = {("HF", "GGUF", "Go"): "all", ("HF", "GGUF"): "HF, GGUF"}


def page() -> str:
    return PAGE.read_text(encoding="utf-8")


def matrix() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(MATRIX.read_text(encoding="utf-8"))
    return content


def cell(row: dict[str, Any], kind: str) -> str:
    equal = row["kinds"][kind]
    if equal is None:
        return "—"
    engines = CELLS.get(tuple(equal), ", ".join(equal) or "none")
    return f"{engines}, as text" if kind in row["as text"] else engines


def table(rows: dict[str, Any]) -> list[str]:
    """The lines of the page's matrix."""
    head = ["template", *KINDS, "renderer"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, row in sorted(rows.items()):
        renderers = " or ".join(f"`{renderer}`" for renderer in row["renderers"]) or "none"
        lines.append(f"| `{name}` | {' | '.join(cell(row, kind) for kind in KINDS)} | {renderers} |")
    return lines


def refusals(rows: dict[str, Any]) -> list[tuple[str, str]]:
    """Template and construct of each refusal."""
    return [(name, row["refusal"]) for name, row in sorted(rows.items()) if row["refusal"]]


def between(name: str) -> list[str]:
    """The lines of the page between the comments <!-- name --> and <!-- /name -->."""
    return page().split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0].splitlines()


def test_the_matrix_on_the_page_is_what_is_computed() -> None:
    wanted = table(matrix())
    assert between("matrix") == wanted, "docs/templates.md: put between the comments:\n" + "\n".join(wanted)


def test_the_refusals_on_the_page_are_what_is_computed() -> None:
    shown = [re.match(r"\| `(\w+)` \| (.*?) \| \S", line) for line in between("refusals")[2:]]
    assert [match.groups() if match else None for match in shown] == refusals(matrix())


def test_a_wrong_cell_changes_the_table() -> None:
    rows = matrix()
    rows["chatml"]["kinds"]["system"] = ["HF", "GGUF"]
    assert table(rows) != table(matrix())
    rows = matrix()
    rows["qwen3"]["refusal"] = ""
    assert refusals(rows) != refusals(matrix())


def test_every_template_is_on_the_page_and_marks_what_is_trained() -> None:
    files = sorted(LIBRARY.glob("*.jinja"))
    assert [file.stem for file in files] == sorted(matrix())
    described = re.findall(r"^\| \[`(\w+)`\]\(\.\./chat_templates/(\w+)\.jinja\) \|", page(), re.MULTILINE)
    assert described == [(file.stem, file.stem) for file in files]
    assert [file.name for file in files if not has_generation_tags(file.read_text(encoding="utf-8"))] == []


def test_the_renderers_are_those_of_params() -> None:
    known = set(get_args(OllamaModelfile.model_fields["renderer"].annotation))
    assert {renderer for row in matrix().values() for renderer in row["renderers"]} == known == {"go", "jinja"}
    for row in matrix().values():
        in_go = [kind for kind, equal in row["kinds"].items() if equal is not None and "Go" in equal]
        assert bool(in_go) == ("go" in row["renderers"]) == (not row["refusal"])


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
def test_the_settings_that_are_shown_are_valid(block: str) -> None:
    yaml = YAML(typ="safe", pure=True)
    whole, shown = yaml.load((ROOT / "recipes/smoke/params.yaml").read_text(encoding="utf-8")), yaml.load(block)
    Params.model_validate({**whole, **{section: {**whole[section], **values} for section, values in shown.items()}})
    if "tokenizer" in shown:
        assert (ROOT / shown["tokenizer"]["chat_template"]).is_file()
