"""scripts/setup_environment.py: what is skipped, what is done again, and what a user is told."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
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


def test_the_environment_of_another_clone_is_not_emptied_through_a_link(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/made-in").write_text("elsewhere")
    (tmp_path / ".venv").symlink_to(tmp_path / "other")
    with pytest.raises(script.SetupError, match=r"\.venv is a link to .*other\n  remedy: rm "):
        script.make_venv(tmp_path / ".venv")
    assert (tmp_path / "other/made-in").read_text() == "elsewhere"


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


@pytest.mark.parametrize(("variable", "language"), [("CC", "C"), ("CXX", r"C\+\+")])
def test_a_missing_compiler_is_named_with_its_remedy(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, variable: str, language: str
) -> None:
    monkeypatch.setenv(variable, "/nowhere/cc")
    with pytest.raises(script.SetupError, match=rf"no {language} compiler \(/nowhere/cc\)[\s\S]*apt-get install g\+\+"):
        script.compilers()


def fake_compiler(folder: Path, version: str) -> str:
    file = folder / version
    file.write_text(f"#!/bin/sh\necho {version}\n")
    file.chmod(0o755)
    return str(file)


@pytest.fixture
def built(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """The environments of the builds that the script asks pip for; pip itself only makes an empty wheel."""
    environments: list[dict[str, str]] = []

    def pip(_: Path, verb: str, *arguments: str | Path, environment: dict[str, str] | None = None) -> None:
        if verb == "wheel" and environment is not None:
            environments.append(environment)
            target = Path(arguments[arguments.index("--wheel-dir") + 1])
            (target / f"llama_cpp_python-{len(environments)}.whl").touch()

    monkeypatch.setattr(script, "pip", pip)
    monkeypatch.setattr(script, "fetch_sdist", lambda *_: tmp_path / "sdist.tar.gz")
    monkeypatch.setenv("CC", fake_compiler(tmp_path, "cc-1"))
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, "cxx-1"))
    return environments


def test_the_build_merges_no_products_and_sums_and_takes_no_flags_of_the_caller(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: list[dict[str, str]]
) -> None:
    monkeypatch.setenv("CFLAGS", "-march=native")
    script.llama_wheel(tmp_path, tmp_path)
    arguments = built[0]["CMAKE_ARGS"].split()
    assert {"-DCMAKE_C_FLAGS=-ffp-contract=off", "-DCMAKE_CXX_FLAGS=-ffp-contract=off"} <= set(arguments)
    assert {"-DGGML_NATIVE=OFF", "-DGGML_AVX2=ON", "-DGGML_AVX512=OFF", "-DGGML_OPENMP=ON"} <= set(arguments)
    assert [argument for argument in arguments if not argument.startswith("-D")] == []
    assert "CFLAGS" not in built[0]


def test_a_wheel_is_built_once_for_each_c_and_cxx_compiler(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: list[dict[str, str]]
) -> None:
    first = script.llama_wheel(tmp_path, tmp_path)
    assert script.llama_wheel(tmp_path, tmp_path) == first
    monkeypatch.setenv("CC", fake_compiler(tmp_path, "cc-2"))
    second = script.llama_wheel(tmp_path, tmp_path)
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, "cxx-2"))
    assert len({first, second, script.llama_wheel(tmp_path, tmp_path)}) == len(built) == 3


def test_another_build_of_the_same_version_replaces_the_installed_one(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str | Path, ...]] = []
    monkeypatch.setattr(script, "pip", lambda _, *arguments: asked.append(arguments))
    monkeypatch.setattr(script, "llama_wheel", lambda *_: tmp_path / "llama.whl")
    script.install_llama(tmp_path, tmp_path)
    assert asked == [("install", "--no-deps", "--force-reinstall", tmp_path / "llama.whl")]
    assert [line.partition(":")[0] for line in (tmp_path / "llama-compilers.txt").read_text().splitlines()] == [
        "cc",
        "c++",
    ]


@pytest.mark.parametrize(
    ("ggml_type", "block_bytes", "expected"),
    [
        (12, 144, "e80578ce675e671512c163d72d22564ddbeef44ee5bf025de34a2d345ff55717"),
        (14, 210, "bb462c7a5e7edc9c56f791565f882c3123d54a4884ce0264e43bbe7bd39d8450"),
    ],
    ids=["Q4_K", "Q6_K"],
)
def test_the_installed_build_quantises_to_these_bytes(ggml_type: int, block_bytes: int, expected: str) -> None:
    """A build that merges products and sums (gcc 12 with -mfma) gives others in 6 and 9 of these 512 blocks."""
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None
    assert spec.origin is not None
    library = ctypes.CDLL(str(next((Path(spec.origin).parent / "lib").glob("libggml-base.*"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
        ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    index = np.arange(512 * 256, dtype=np.int64)
    weights = ((index * index * 7919 + index * 104729) % 65537 - 32768).astype(np.float32) / np.float32(32768)
    weights = np.ascontiguousarray(weights * weights * weights)
    blocks = ctypes.create_string_buffer(512 * block_bytes)
    library.ggml_quantize_chunk(ggml_type, weights.ctypes.data, blocks, 0, 512, 256, None)
    assert hashlib.sha256(blocks.raw).hexdigest() == expected


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
