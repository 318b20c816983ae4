"""A version in mode `serving`: loaded from the registry, it finds its GGUF by hash and answers through the template."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import tiny_gguf
from mlflow.exceptions import MlflowException
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from registry_server import ask, models_server
from run_files import metrics, register_argv, write_run
from serving_child import NUM_CTX, SYSTEM, TEMPLATE

from finetune.chat_template import serving_form
from finetune.errors import DataError, FinetuneError
from finetune.export.modelfile import Modelfile, render_modelfile
from finetune.io import write_text
from finetune.params import load_params
from finetune.stages import register as stage
from finetune.tracking.client import PATIENT, connect
from finetune.tracking.logged_model import SERVING_NEEDS
from finetune.tracking.registry import ask_registered

ROOT = Path(__file__).parents[3]
URI = "models:/finetune-smoke@challenger"
QUESTION = {"messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a finished run whose GGUF says one token and stops, registered in mode `serving`."""
    root = tmp_path_factory.mktemp("clone")
    write_run(root, metrics())
    for name in ("base", "merged"):
        write_text(root / "models" / name / "model.bin", name)
    gguf = root / "models/gguf/model-Q8_0.gguf"
    tiny_gguf.write_gguf(gguf, tiny_gguf.train_tokenizer(), serving_form(TEMPLATE), add_bos=True, answer="a")
    modelfile = Modelfile("../gguf/model-Q8_0.gguf", "unused", SYSTEM, NUM_CTX, 0.0, 0.9, 1.0, ("</s>",))
    write_text(root / "models/ollama/Modelfile", render_modelfile(modelfile, context_tokens=NUM_CTX))
    argv = register_argv(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(root))
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
        patch.setenv("GIT_CEILING_DIRECTORIES", str(root.parent))
        patch.chdir(root)
        settings = load_params(argv[4]).registration
        stage.run(*argv, register=settings.model_copy(update={"mode": "serving"}))
        connect(PATIENT)
        yield root


@pytest.fixture
def here(clone: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(clone)
    return clone


def load() -> Any:
    return mlflow.pyfunc.load_model(URI)


def test_it_answers_through_the_served_template_from_the_folder_where_it_was_made(here: Path) -> None:
    (answer,) = load().predict(QUESTION)
    assert answer["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": "a"}, "finish_reason": "stop"}
    ]
    # SYSTEM of the Modelfile leads, as in Ollama: <s>, both turns and the start of the answer.
    text = f"<s><|system|>\n{SYSTEM}\n<|user|>\nHello\n<|assistant|>\n"
    ids = tiny_gguf.train_tokenizer().encode(text, add_special_tokens=False).ids
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert ask_registered(URI, "Hello") == "a"


def test_it_is_found_in_the_folder_that_is_named(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(here / "models/gguf/model-Q8_0.gguf", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FINETUNE_MODEL_DIR", str(tmp_path))
    assert load().predict(QUESTION)[0]["choices"][0]["message"]["content"] == "a"


def test_another_file_of_the_name_is_refused(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = bytearray((here / "models/gguf/model-Q8_0.gguf").read_bytes())
    changed[-1] ^= 1
    (tmp_path / "model-Q8_0.gguf").write_bytes(changed)
    monkeypatch.setenv("FINETUNE_MODEL_DIR", str(tmp_path))
    with pytest.raises(DataError, match=r"this is not the registered file(.|\n)*unset FINETUNE_MODEL_DIR"):
        load()


def test_where_it_is_nowhere_the_pull_says_what_is_missing(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FinetuneError, match="finetune-smoke version 1"):
        load()
    assert list(tmp_path.rglob("*.gguf")) == []


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"messages": []}, "messages is a list"),
        ({"inputs": "Hello"}, 'the body is {"messages"'),
        ({**QUESTION, "stream": True}, "has no streams"),
        ({**QUESTION, "temperature": "hot"}, "temperature|valid number"),
        ({**QUESTION, "grammar": "root ::= x"}, "grammar is not supported"),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_line(here: Path, body: dict[str, Any], said: str) -> None:
    with pytest.raises(MlflowException, match=said):
        load().unwrap_python_model().predict(None, body)


def test_the_version_holds_code_and_no_pickle(clone: Path) -> None:
    folder = next(path.parent for path in (clone / "mlartifacts").rglob("MLmodel"))
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"serving_model.py", "artifacts/Modelfile", "code/finetune/serving/served.py"} <= names
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".pyc", ".gguf", ".safetensors"))]
    kept = [line for line in (folder / "MLmodel").read_text().splitlines() if not line.startswith("artifact_path")]
    assert [line for line in kept if str(clone / "models") in line or str(ROOT) in line] == []
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 4 << 20


def test_the_requirements_bring_all_that_it_imports() -> None:
    code = (
        "import sys, finetune.serving.served, finetune.serving.calls, finetune.tracking.client\n"
        "print(*(each.__file__ for name, each in sys.modules.items() if name.startswith('finetune')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    files = [ROOT / "src/finetune/tracking/serving_model.py", *map(Path, done.stdout.split())]
    owners = importlib.metadata.packages_distributions()
    imported = {
        canonicalize_name(owner) for file in files for name in first_names(file) for owner in owners.get(name, [])
    }
    brought: set[str] = set()
    for name in SERVING_NEEDS:
        bring(name, brought)
    assert sorted(imported - brought - {"finetune"}) == []
    assert {"llama-cpp-python", "pydantic", "sqlalchemy"} <= imported


def bring(name: str, brought: set[str]) -> None:
    """Collect a package with all that its metadata asks for."""
    if canonicalize_name(name) in brought:
        return
    brought.add(canonicalize_name(name))
    for text in importlib.metadata.requires(name) or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            bring(requirement.name, brought)


def first_names(file: Path) -> set[str]:
    """The first names of what a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_mlflows_own_server_serves_it(here: Path) -> None:
    with models_server(URI, here, f"sqlite:///{here}/mlflow.db") as port:
        status, text = ask(port, {**QUESTION, "max_tokens": 5})
        assert status == 200, text
        assert json.loads(text)[0]["choices"][0]["message"]["content"] == "a"
        status, text = ask(port, {**QUESTION, "stream": True})
        assert (status, "has no streams" in text) == (400, True)
