"""Models of anybody: pickles in place of weights, and Python that a repository wants to have run. None of it runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import REVISION, ROOT, fetch, serving, source
from training_settings import make_lora

from finetune.io import write_json
from finetune.training.checkpoint import is_intact, newest_intact, save
from finetune.training.model import (
    add_adapter,
    attach_adapter,
    check_needs_no_code,
    load_base,
    locate_base,
    save_adapter,
)
from finetune.training.vocabulary import Extension

CPU = torch.device("cpu")
CODE = "from pathlib import Path\nPath({owned!r}).touch()\n"


class Payload:
    """What a pickle runs when it is read."""

    def __init__(self, owned: Path) -> None:
        self.owned = owned

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return exec, (CODE.format(owned=str(self.owned)),)


@pytest.fixture
def owned(tmp_path: Path) -> Path:
    """The file that a payload makes; the payload works."""
    file = tmp_path / "OWNED"
    pickle.loads(pickle.dumps(Payload(file)))  # noqa: S301
    assert file.exists()
    file.unlink()
    return file


def with_pickle(base: Path, folder: Path, name: str, owned: Path) -> Path:
    """A copy of a base with a pickle beside its weights."""
    shutil.copytree(base, folder)
    torch.save({"model.embed_tokens.weight": Payload(owned)}, folder / name)
    return folder


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_a_base_of_pickles_is_refused_and_they_are_not_read(
    tiny_base: Path, tmp_path: Path, owned: Path, name: str
) -> None:
    base = with_pickle(tiny_base, tmp_path / "base", name, owned)
    load_base(base, None, torch.float32, CPU)
    (base / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load_base(base, None, torch.float32, CPU)
    assert not owned.exists()


def test_a_checkpoint_with_a_pickle_in_it_is_passed_over(tmp_path: Path, owned: Path) -> None:
    checkpoint = save(tmp_path / "run", 5, {"w": torch.ones(2)}, {"state": {"step": 5}})
    assert is_intact(checkpoint)
    torch.save(Payload(owned), checkpoint / "optimizer.pt")
    assert newest_intact(tmp_path / "run") is None
    assert not owned.exists()


def test_an_adapter_of_a_pickle_is_refused_and_it_is_not_read(tiny_base: Path, tmp_path: Path, owned: Path) -> None:
    base, adapter = load_base(tiny_base, None, torch.float32, CPU), tmp_path / "adapter"
    model = add_adapter(base, make_lora(), Extension((), 0))
    save_adapter(model, adapter)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"w": Payload(owned)}, adapter / "adapter_model.bin")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        attach_adapter(load_base(tiny_base, None, torch.float32, CPU), adapter)
    assert not owned.exists()


def snapshot_of(folder: Path, name: str) -> Path:
    return folder / f"hub/models--team--{name}/snapshots" / REVISION


def hub_base(
    folder: Path, name: str, owned: Path, config: dict[str, Any], tokenizer: dict[str, Any]
) -> tuple[Path, Path]:
    """models/base and models/tokenizer of a model in a Hub cache, each with code of its own beside it."""
    snapshot, base, words = snapshot_of(folder, name), folder / name / "base", folder / name / "words"
    for place in (snapshot, base, words):
        place.mkdir(parents=True)
        for module in ("configuration_own", "tokenization_own", "modeling_own"):
            (place / f"{module}.py").write_text(CODE.format(owned=str(owned)), encoding="utf-8")
    write_json(snapshot / "config.json", config)
    write_json(words / "tokenizer_config.json", tokenizer)
    write_json(base / "base.json", {"kind": "hub", "repo_id": f"team/{name}", "revision": REVISION, "files": []})
    return base, words


CHECK = """
import sys
from pathlib import Path
from finetune.errors import DataError
from finetune.training.model import check_needs_no_code
for base, words in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        check_needs_no_code(Path(base), Path(words))
    except DataError as error:
        print(error)
"""
LLAMA = {"model_type": "llama"}
NEED_CODE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}, {}),
    ({"model_type": "own", "auto_map": {"AutoConfig": "other/repo--configuration_own.OwnConfig"}}, {}),
    ({"model_type": "own"}, {}),
    (
        LLAMA,
        {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}},
    ),
]


def test_code_of_a_repository_is_refused_without_a_question_and_not_run(tmp_path: Path, owned: Path) -> None:
    places = [hub_base(tmp_path, f"model{number}", owned, *files) for number, files in enumerate(NEED_CODE)]
    cache = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", CHECK, *(str(place) for pair in places for place in pair)]
    environment = {**os.environ, **cache, "PYTHONPATH": str(ROOT / "src")}
    # Whoever is asked at the terminal says yes.
    done = subprocess.run(command, env=environment, input="y\n" * 9, capture_output=True, text=True, check=True)
    assert done.stdout.count("transformers cannot read it without code of its repository: ") == 4, done.stderr
    wheres = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("  where:")]
    folders = [snapshot_of(tmp_path, f"model{number}") for number in range(3)]
    assert wheres == [*map(str, folders), str(places[3][1])]
    assert "[y/N]" not in done.stdout + done.stderr
    assert not owned.exists()


def test_code_beside_an_architecture_that_transformers_has_is_not_run(
    tiny_base: Path, tiny_tokenizer: Any, tmp_path: Path, owned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    config = {**json.loads((tiny_base / "config.json").read_text(encoding="utf-8")), "auto_map": own}
    base, words = hub_base(tmp_path, "model", owned, config, {})
    tiny_tokenizer.save_pretrained(words)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    check_needs_no_code(base, words)
    shutil.copyfile(tiny_base / "model.safetensors", locate_base(base) / "model.safetensors")
    model = load_base(base, None, torch.float32, CPU)
    assert type(model).__module__.startswith("transformers.")
    assert not owned.exists()


def test_fetch_takes_neither_pickles_nor_code(tmp_path: Path) -> None:
    files = {
        "config.json": b"{}",
        "model.safetensors": b"weights",
        "tokenizer.json": b'{"version": "1.0"}',
        "pytorch_model.bin": b"pickle",
        "training_args.bin": b"pickle",
        "modeling_own.py": b"code",
        "setup.sh": b"code",
    }
    for hub in serving({"team/model": files, "datasets/team/data": {"a.jsonl": b'{"messages": []}\n'}}):
        base = {"kind": "hub", "repo_id": "team/model", "revision": REVISION}
        done = fetch(hub, tmp_path, source(files="a.jsonl"), base=base)
        assert done.returncode == 0, done.stderr
        sent = [request.path.rpartition("/")[2] for request in hub.requests if request.sent_bytes]
    assert sorted(sent) == ["a.jsonl", "config.json", "model.safetensors", "tokenizer.json"]
