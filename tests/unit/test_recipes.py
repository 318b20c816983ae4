from __future__ import annotations

from pathlib import Path

import pytest

from finetune.errors import ParamsError
from finetune.params import load_params
from finetune.recipes import main, names, use

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", sorted(file.parent.name for file in ROOT.glob("recipes/*/params.yaml")))
def test_every_recipe_is_valid_and_documented(name: str, tmp_path: Path) -> None:
    text = (ROOT / "recipes" / name / "params.yaml").read_text(encoding="utf-8")
    readme = (ROOT / "recipes" / name / "README.md").read_text(encoding="utf-8")
    # A branch name is what `make pin` replaces, and then the recipe must say so.
    assert ("revision: main" in text) == (f"make pin NAME={name}\n" in readme)
    (tmp_path / "params.yaml").write_text(text.replace("revision: main", f"revision: {'a' * 40}"), encoding="utf-8")
    params = load_params(tmp_path / "params.yaml")
    assert params.recipe == name
    assert (ROOT / params.tokenizer.chat_template).is_file()
    assert readme.startswith(f"# {name}\n")


def test_a_recipe_replaces_params_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = (ROOT / "recipes/smoke/params.yaml").read_bytes()
    (tmp_path / "recipes/smoke").mkdir(parents=True)
    (tmp_path / "recipes/smoke/params.yaml").write_bytes(content)
    (tmp_path / "params.yaml").write_text("recipe: other\n")
    assert names() == ["smoke"]
    assert main(["smoke"]) == 0
    assert (tmp_path / "params.yaml").read_bytes() == content


def test_an_unknown_recipe_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    before = (ROOT / "params.yaml").read_bytes()
    with pytest.raises(ParamsError, match=r"there is no recipe 'smokey'[\s\S]*make recipe NAME=smoke"):
        use("smokey")
    assert main(["smokey"]) == 1
    assert (ROOT / "params.yaml").read_bytes() == before


def test_a_recipe_under_another_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes/mine").mkdir(parents=True)
    (tmp_path / "recipes/mine/params.yaml").write_bytes((ROOT / "recipes/smoke/params.yaml").read_bytes())
    with pytest.raises(ParamsError, match=r"the recipe calls itself 'smoke'[\s\S]*write `recipe: mine` in it"):
        use("mine")
