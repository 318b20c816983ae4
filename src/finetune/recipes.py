"""recipes/<name>/params.yaml -> params.yaml, checked first: `python -m finetune.recipes NAME`."""

from __future__ import annotations

import sys
from pathlib import Path

from finetune.errors import FinetuneError, ParamsError
from finetune.io import write_bytes
from finetune.log import logger, setup_logging
from finetune.params import load_params

RECIPES = Path("recipes")
PARAMS_FILE = Path("params.yaml")


def names() -> list[str]:
    """The recipes of this repository, in alphabetical order."""
    return sorted(file.parent.name for file in RECIPES.glob("*/params.yaml"))


def use(name: str) -> None:
    """Check a recipe and copy it over params.yaml; raises ParamsError for an unknown or invalid one."""
    if name not in names():
        raise ParamsError(f"there is no recipe {name!r}", RECIPES, f"make recipe NAME=smoke (of {', '.join(names())})")
    source = RECIPES / name / "params.yaml"
    recipe = load_params(source).recipe
    if recipe != name:
        raise ParamsError(f"the recipe calls itself {recipe!r}", source, f"write `recipe: {name}` in it")
    write_bytes(PARAMS_FILE, source.read_bytes())
    logger.info("params.yaml is now the recipe %s; next: make repro", name)


def main(arguments: list[str]) -> int:
    """Use the recipe named by the one argument; returns the exit code."""
    setup_logging("recipe")
    try:
        use(" ".join(arguments))
    except FinetuneError as error:
        logger.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
