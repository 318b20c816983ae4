"""`mlflow models serve` on a version that the register stage uploaded, asked over HTTP on a free port of 127.0.0.1."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from registry_server import ask, models_server
from test_register import QUESTION, make_outputs, register
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory, untied_base: Path) -> Path:
    """The merged model of a finished pipeline whose version is registered."""
    root = tmp_path_factory.mktemp("a clone")
    argv = make_outputs(root, untied_base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(root))
        patch.setenv("MLFLOW_TRACKING_URI", "")
        register(argv)
    return argv[1]


@pytest.fixture(scope="module")
def port(merged: Path) -> Iterator[int]:
    with models_server("models:/finetune-smoke@challenger", merged.parents[1], "sqlite:///mlflow.db") as number:
        yield number


def test_the_version_answers_over_http_as_the_merged_model_does(port: int, merged: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged, dtype="auto"), AutoTokenizer.from_pretrained(merged)
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert prompt["input_ids"].tolist() == [[1, 3, 5, 6, 7, 4]]
    ids = model.generate(**prompt, do_sample=False, max_new_tokens=20)[0, 6:]
    status, text = ask(port, {"messages": messages, "max_tokens": 20})
    assert status == 200, text
    (completion,) = json.loads(text)
    assert completion["choices"][0]["message"]["content"] == tokenizer.decode(ids, skip_special_tokens=True)
    assert completion["usage"]["prompt_tokens"] == 6
    assert completion["usage"]["completion_tokens"] == len(ids)


def test_what_the_version_cannot_do_is_as_documented(port: int) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    greedy = [
        json.loads(ask(port, {"messages": messages, "max_tokens": 8, **more})[1])[0]["choices"]
        for more in ({}, {"temperature": 1.5})
    ]
    assert greedy[0] == greedy[1]
    for more in ({"stop": ["m"]}, {"stream": True}):
        assert ask(port, {"messages": messages, "max_tokens": 8, **more})[0] == 400
