"""scripts/setup_environment.py: what is skipped, what is done again, and what a user is told."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
TREE = {
    "convert_hf_to_gguf.py": "main",
    "conversion/base.py": "base",
    "gguf-py/gguf/__init__.py": "gguf",
    "gguf-py/tests/test.py": "no",
    "src/llama.cpp": "no",
}


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_environment", ROOT / "scripts" / "setup_environment.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def archive_of(tree: dict[str, str], folder: Path) -> Path:
    for name, text in tree.items():
        file = folder / "llama_cpp_python-0" / "vendor" / "llama.cpp" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    with tarfile.open(folder / "sdist.tar.gz", "w:gz") as tar:
        tar.add(folder / "llama_cpp_python-0", arcname="llama_cpp_python-0")
    return folder / "sdist.tar.gz"


def test_a_step_runs_once_per_key_and_again_when_its_product_is_gone(script: ModuleType, tmp_path: Path) -> None:
    made, done = tmp_path / "made", []

    def action() -> None:
        made.touch()
        done.append(1)

    for key in ("a", "a", "b"):
        script.once(tmp_path / "stamps.json", "step", key, made, action, "label")
    assert len(done) == 2
    made.unlink()
    script.once(tmp_path / "stamps.json", "step", "b", made, action, "label")
    assert len(done) == 3
    assert json.loads((tmp_path / "stamps.json").read_text()) == {"step": "b"}


def test_a_step_that_failed_is_tried_again(script: ModuleType, tmp_path: Path) -> None:
    def fail() -> None:
        script.run("false")

    with pytest.raises(script.SetupError, match="failed with status 1"):
        script.once(tmp_path / "stamps.json", "step", "a", tmp_path, fail, "label")
    assert not (tmp_path / "stamps.json").exists()


def test_the_key_of_a_folder_is_its_content(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a==1")
    before = script.digest(tmp_path)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "x.pyc").write_text("x")
    assert script.digest(tmp_path) == before
    (tmp_path / "train.txt").write_text("a==2")
    assert script.digest(tmp_path) != before


def test_the_converter_is_taken_out_with_its_own_gguf(script: ModuleType, tmp_path: Path) -> None:
    script.extract_converter(archive_of(TREE, tmp_path), tmp_path / "convert")
    found = sorted(file.relative_to(tmp_path / "convert").as_posix() for file in (tmp_path / "convert").rglob("*.*"))
    assert found == ["conversion/base.py", "convert_hf_to_gguf.py", "gguf/__init__.py"]
    assert (tmp_path / "convert" / "gguf" / "__init__.py").read_text() == "gguf"


def test_an_archive_without_the_converter_is_an_error(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(script.SetupError, match=r"does not hold llama\.cpp's converter"):
        script.extract_converter(archive_of({"src/llama.cpp": "x"}, tmp_path), tmp_path / "convert")
    assert not (tmp_path / "convert").exists()


@pytest.mark.parametrize(
    ("line", "accepted"), [("cuda: Optional[str] = None", True), ("cuda: Optional[str] = '13.0'", False)]
)
def test_the_cpu_choice_is_not_met_by_a_cuda_build(
    script: ModuleType, tmp_path: Path, line: str, accepted: bool
) -> None:
    version = tmp_path / "lib" / "python3.11" / "site-packages" / "torch" / "version.py"
    version.parent.mkdir(parents=True)
    version.write_text(f"__version__ = '2.13.0'\n{line}\n")
    script.check_torch_build(tmp_path, "")
    if accepted:
        script.check_torch_build(tmp_path, "cpu")
    else:
        with pytest.raises(script.SetupError, match="make clean-tools, then make setup TORCH=cpu"):
            script.check_torch_build(tmp_path, "cpu")


def test_a_missing_compiler_is_named_with_its_remedy(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(script.SetupError, match=r"no C\+\+ compiler \(/nowhere/c\+\+\)[\s\S]*apt-get install g\+\+"):
        script.compiler()


def test_make_says_which_python_is_needed(tmp_path: Path) -> None:
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python3").chmod(0o755)
    make = shutil.which("make")
    assert make is not None
    done = subprocess.run(
        [make, "setup"], cwd=ROOT, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "no Python 3.11 or 3.12 found as python3, python3.11 or python3.12" in done.stderr
    assert "remedy: install one, or name it: make setup PYTHON=/path/to/python3.12" in done.stderr
