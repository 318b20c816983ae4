import json
from pathlib import Path

import pytest
import tiny_gguf
from go_comparison import PLAIN_TOOLS

from finetune.errors import ExportError
from finetune.export.modelfile import parse_modelfile
from finetune.sections import OllamaModelfile
from finetune.stages.ollama_modelfile import run

SMOKE = Path("recipes/smoke/chat_template.jinja").read_text(encoding="utf-8")
REFUSE_SYSTEM = "{%- if message['role'] == 'system' -%}{{- raise_exception('no') -}}{%- elif message['role'] == 'ass"
SETTINGS = OllamaModelfile(
    quantization="Q8_0",
    renderer="go",
    system="Sois bref.",
    num_ctx=512,
    temperature=0.2,
    top_p=0.9,
    repeat_penalty=1.0,
    stop=["\n\n"],
)


def make(folder: Path, template: str = SMOKE) -> None:
    tokenizer = tiny_gguf.train_tokenizer()
    tiny_gguf.write_tokenizer(folder / "tokenizer", tokenizer, template)
    serving = (folder / "tokenizer" / "chat_template.jinja").read_text(encoding="utf-8")
    tiny_gguf.write_gguf(folder / "gguf" / "model-Q8_0.gguf", tokenizer, serving, add_bos=True)


def run_in(folder: Path, settings: OllamaModelfile = SETTINGS) -> None:
    run(folder / "gguf", folder / "tokenizer", folder / "ollama", folder / "metrics.json", ollama_modelfile=settings)


def test_writes_modelfile_template_and_metrics(tmp_path: Path) -> None:
    make(tmp_path)
    run_in(tmp_path)
    modelfile = parse_modelfile((tmp_path / "ollama" / "Modelfile").read_text(encoding="utf-8"))
    assert (modelfile.from_path, modelfile.stops) == ("../gguf/model-Q8_0.gguf", ("</s>", "\n\n"))
    assert (modelfile.system, modelfile.num_ctx) == ("Sois bref.", 512)
    assert modelfile.template == (tmp_path / "ollama" / "template.gotmpl").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8")) == {
        "add_bos": True,
        "chats": 124,
        "num_ctx": 512,
        "parity": 1.0,
        "renderer": "go",
        "roles": ["system", "user", "assistant", "tool"],
        "stops": ["</s>", "\n\n"],
        "tools": True,
    }


def test_renderer_jinja_serves_functions_that_go_cannot_write(tmp_path: Path) -> None:
    template = "{{ bos_token }}" + PLAIN_TOOLS.replace("'<|im_end|>'", "eos_token")
    make(tmp_path, template)
    with pytest.raises(ExportError, match=r"set ollama_modelfile\.renderer to jinja"):
        run_in(tmp_path)
    run_in(tmp_path, SETTINGS.model_copy(update={"renderer": "jinja"}))
    text = (tmp_path / "ollama" / "Modelfile").read_text(encoding="utf-8")
    assert text.endswith("REQUIRES 0.30.0\n")
    assert ".Tools" not in parse_modelfile(text).template
    metrics = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert (metrics["renderer"], metrics["tools"], metrics["parity"], metrics["chats"]) == ("jinja", True, 1.0, 124)


def test_a_difference_in_chats_that_only_the_gguf_renders_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "{{ bos_token }}" + PLAIN_TOOLS.replace("'<|im_end|>'", "eos_token"))
    training = tmp_path / "tokenizer" / "training_template.jinja"
    training.write_text(training.read_text(encoding="utf-8").replace("tool | tojson", "tool | tojson + ' '"))
    with pytest.raises(ExportError, match="chat 'one function', embedded, token"):
        run_in(tmp_path, SETTINGS.model_copy(update={"renderer": "jinja"}))


def test_a_turn_may_end_in_a_token_that_is_not_eos_if_the_gguf_stops_there(tmp_path: Path) -> None:
    make(tmp_path, SMOKE.replace("eos_token", "'<|tool|>'"))
    with pytest.raises(ExportError, match="ends them with '<\\|tool\\|>\\\\n', at which the GGUF does not stop"):
        run_in(tmp_path)
    template = (tmp_path / "tokenizer" / "chat_template.jinja").read_text(encoding="utf-8")
    gguf, tokenizer = tmp_path / "gguf" / "model-Q8_0.gguf", tiny_gguf.train_tokenizer()
    tiny_gguf.write_gguf(gguf, tokenizer, template, add_bos=True, turn_end="<|tool|>")
    run_in(tmp_path)
    modelfile = parse_modelfile((tmp_path / "ollama" / "Modelfile").read_text(encoding="utf-8"))
    assert modelfile.stops == ("<|tool|>", "</s>", "\n\n")


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("{{- eos_token -}}", "", "answers would never stop: the template ends them with '\\\\n'"),
        ("{{- eos_token -}}", "{{- '<|im_end|>' -}}", "answers would never stop"),
        ("{{- eos_token -}}", "{{- ' ' + eos_token -}}", "answers would never stop"),
        ("{{- bos_token -}}", "{{- '' -}}", "adds BOS to every prompt"),
        ("{%- if message['role'] == 'ass", REFUSE_SYSTEM, "the chat template has no system role"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_served_is_refused(tmp_path: Path, old: str, new: str, fault: str) -> None:
    make(tmp_path, SMOKE.replace(old, new))
    with pytest.raises(ExportError, match=fault):
        run_in(tmp_path)
    assert not (tmp_path / "ollama").exists()


def test_training_template_that_differs_from_the_serving_one_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    training = tmp_path / "tokenizer" / "training_template.jinja"
    training.write_text(SMOKE.replace("'<|assistant|>\\n'", "'<|assistant|> '"), encoding="utf-8")
    with pytest.raises(ExportError, match="of 124 chats, 0 are equal"):
        run_in(tmp_path)


def test_num_ctx_above_the_models_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(ExportError, match="num_ctx is 2048, the model was made for 1024 tokens"):
        run_in(tmp_path, SETTINGS.model_copy(update={"num_ctx": 2048}))


def test_missing_gguf_is_named(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(ExportError, match=r"model-F16\.gguf"):
        run_in(tmp_path, SETTINGS.model_copy(update={"quantization": "F16"}))
