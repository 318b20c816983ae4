"""The README of dolores_v5: every option of the note's command line has its parameter, with the value it asks for."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pipeline_files import ROOT
from ruamel.yaml import YAML

from finetune.params import load_params

FOLDER = ROOT / "recipes/dolores_v5"
# The note's command, option by option; one without a value switches something on.
COMMAND = """
--model "meta-llama/Llama-3.1-8B-Instruct"
--train-files train.chatml
--input-format chatml
--output runs_dolores_v5/llama31_clean
--epochs 1
--max-length 2048
--train-batch-size 1
--eval-batch-size 1
--grad-accum 32
--learning-rate 1.5e-4
--lr-scheduler-type cosine
--warmup-ratio 0.03
--max-grad-norm 0.8
--lora-r 32
--lora-alpha 64
--lora-dropout 0.05
--lora-target-modules q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj
--bf16
--bnb-nf4
--bnb-dtype bfloat16
--optim paged_adamw_8bit
--torch-memory-fraction 0.95
--cuda-alloc-expandable
--max-split-size-mb 128
--gradient-checkpointing
--packing
--logging-steps 1
--eval-steps 10
--save-steps 10
--save-total-limit 5
""".strip().splitlines()
# Options that no parameter has: the README says what is done instead.
WITHOUT = ["--output runs_dolores_v5/llama31_clean", "--eval-batch-size 1"]
# The card's memory decides, not the recipe.
DECIDED = ["--train-batch-size 1"]
ROW = re.compile(r"^\| `(--[^`]+)` \| (?:`([\w.]+): ([^`]+)`)? ?\| (.*)\|$", re.MULTILINE)
YAML_1_2 = YAML(typ="safe", pure=True)
FOUND = ROW.findall((FOLDER / "README.md").read_text(encoding="utf-8"))
ROWS = {option: (key, value, remark.strip()) for option, key, value, remark in FOUND}


def value_of(key: str) -> Any:
    """The value in the recipe's params.yaml, read as the pipeline reads it."""
    found: Any = load_params(FOLDER / "params.yaml").model_dump(mode="json")
    for part in key.split("."):
        found = found[int(part)] if isinstance(found, list) else found[part]
    return found


def test_every_option_of_the_note_has_one_row_in_its_order() -> None:
    assert list(ROWS) == COMMAND


@pytest.mark.parametrize("option", COMMAND)
def test_the_key_exists_and_has_the_value_that_is_written_and_that_the_note_asks_for(option: str) -> None:
    key, written, remark = ROWS[option]
    if option in WITHOUT:
        assert (key, written) == ("", "")
        assert remark
        return
    expected = YAML_1_2.load(written)
    assert value_of(key) == expected
    name, _, asked = option.partition(" ")
    if "," in asked:
        assert asked.split(",") == expected
    elif asked and option not in DECIDED:
        assert YAML_1_2.load(asked) == expected
    else:
        assert expected not in (False, None, "none", "float32"), name
