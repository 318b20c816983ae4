from dataclasses import replace
from pathlib import Path

import pytest

from finetune.errors import ExportError
from finetune.export.modelfile import Modelfile, parse_modelfile, read_modelfile, render_modelfile

PLAIN = Modelfile(
    from_path="../gguf/model-Q8_0.gguf",
    template='{{- range .Messages }}{{ .Content }}{{ "\\n" }}\n{{- end }}',
    system="Tu es l'assistant.\nRéponds court.",
    num_ctx=1024,
    temperature=0.2,
    top_p=0.9,
    repeat_penalty=1.0,
    stops=("</s>", "\nUser:"),
)
GOLDEN = '''FROM ../gguf/model-Q8_0.gguf
TEMPLATE """{{- range .Messages }}{{ .Content }}{{ "\\n" }}
{{- end }}"""
SYSTEM """Tu es l'assistant.
Réponds court."""
PARAMETER num_ctx 1024
PARAMETER temperature 0.2
PARAMETER top_p 0.9
PARAMETER repeat_penalty 1.0
PARAMETER stop "</s>"
PARAMETER stop """
User:"""
'''


def test_golden_text() -> None:
    assert render_modelfile(PLAIN, context_tokens=1024) == GOLDEN


def test_the_oldest_ollama_is_a_line_of_its_own() -> None:
    modelfile = replace(PLAIN, requires="0.30.0")
    text = render_modelfile(modelfile, context_tokens=1024)
    assert text == GOLDEN + "REQUIRES 0.30.0\n"
    assert parse_modelfile(text) == modelfile


def test_a_modelfile_whose_gguf_is_missing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ollama" / "Modelfile"
    with pytest.raises(ExportError, match=r"the Modelfile is missing[^|]*dvc repro ollama_modelfile"):
        read_modelfile(path)
    path.parent.mkdir()
    path.write_text(GOLDEN, encoding="utf-8")
    with pytest.raises(ExportError, match=r"the GGUF that FROM names is missing .*model-Q8_0\.gguf.* pull a model"):
        read_modelfile(path)
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model-Q8_0.gguf").touch()
    modelfile, gguf = read_modelfile(path)
    assert (modelfile, gguf.resolve()) == (PLAIN, (tmp_path / "gguf" / "model-Q8_0.gguf").resolve())
    path.write_text(GOLDEN.replace("FROM ../gguf/model-Q8_0.gguf\n", ""), encoding="utf-8")
    with pytest.raises(ExportError, match="no from_path"):
        read_modelfile(path)


def test_no_system_writes_no_line() -> None:
    text = render_modelfile(replace(PLAIN, system=""), context_tokens=1024)
    assert "SYSTEM" not in text
    assert parse_modelfile(text).system == ""


@pytest.mark.parametrize(
    "modelfile",
    [
        PLAIN,
        replace(PLAIN, system='"quoted"', template='""" starts'),
        replace(PLAIN, system='ends in """', template=" \n\n spaces around \t\n"),
        replace(PLAIN, system='"\n""\nSYSTEM x\n# no comment\r\nend', stops=('"', '""', ' "a" ', "  ", "\t")),
        replace(PLAIN, temperature=1e-05, stops=(), from_path="../a folder/model.gguf"),
    ],
)
def test_round_trip(modelfile: Modelfile) -> None:
    assert parse_modelfile(render_modelfile(modelfile, context_tokens=4096)) == modelfile


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"system": "no\u00a0break"}, r"SYSTEM has characters that Ollama drops .*U\+00A0"),
        ({"system": "family 👨\u200d👩"}, r"SYSTEM has characters that Ollama drops .*U\+200D"),
        ({"template": "\ufeff{{ . }}"}, r"TEMPLATE has characters that Ollama drops .*U\+FEFF"),
        ({"stops": ("a\u200bb",)}, r"PARAMETER stop has characters that Ollama drops .*U\+200B"),
        ({"system": "form\ffeed"}, r"SYSTEM has characters that Ollama drops .*U\+000C"),
        ({"system": 'say """\nand go on'}, "SYSTEM has a line that ends with"),
        ({"template": 'a""" \t\rb'}, "TEMPLATE has a line that ends with"),
        ({"stops": ("",)}, "empty stop string"),
        ({"num_ctx": 1025}, "num_ctx is 1025, the model was made for 1024 tokens"),
        ({"from_path": "a\nb"}, "not a path that FROM can hold"),
    ],
)
def test_what_ollama_would_not_read_back_is_refused(change: dict[str, object], fault: str) -> None:
    with pytest.raises(ExportError, match=fault):
        render_modelfile(replace(PLAIN, **change), context_tokens=1024)  # type: ignore[arg-type]


def test_parser_reads_as_ollama_reads() -> None:
    text = '# comment\nfrom ./a b.gguf \nTemplate x\nSYSTEM "one\ntwo"\nSYSTEM """no\u00a0break"""\n' + "".join(
        f"PARAMETER {name} 1\n" for name in ("num_ctx", "temperature", "top_p", "repeat_penalty")
    )
    assert parse_modelfile(text) == Modelfile("./a b.gguf", "x", "nobreak", 1, 1.0, 1.0, 1.0, ())


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (GOLDEN + 'SYSTEM """open"" \n', "a quoted value is not closed"),
        (GOLDEN.replace("FROM", "FORM"), "unknown command"),
        (GOLDEN.replace("num_ctx 1024", "num_ctx 1e3"), "a PARAMETER is not a number"),
        (GOLDEN.replace("PARAMETER top_p 0.9\n", ""), "no top_p"),
        (GOLDEN + "PARAMETER top_k 4\n", "PARAMETER TOP_K is not written by this project"),
        (GOLDEN + "SYSTEM\n", "a command without value"),
    ],
)
def test_a_broken_modelfile_is_refused(text: str, fault: str) -> None:
    with pytest.raises(ExportError, match=fault):
        parse_modelfile(text)
