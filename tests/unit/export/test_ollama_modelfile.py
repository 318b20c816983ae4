import json
from pathlib import Path

import pytest
import tiny_gguf

from finetune.errors import ExportError
from finetune.export.modelfile import parse_modelfile
from finetune.sections import OllamaModelfile
from finetune.stages.ollama_modelfile import run

SMOKE = Path("recipes/smoke/chat_template.jinja").read_text(encoding="utf-8")
SETTINGS = OllamaModelfile(
    quantization="Q8_0", system="Sois bref.", num_ctx=512, temperature=0.2, top_p=0.9, repeat_penalty=1.0, stop=["\n\n"]
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
        "chats": 72,
        "num_ctx": 512,
        "parity": 1.0,
        "roles": ["system", "user", "assistant", "tool"],
        "stops": ["</s>", "\n\n"],
    }


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("message['content'] + eos_token", "message['content']", "answers would never stop"),
        ("{{- bos_token -}}", "{{- '' -}}", "adds BOS to every prompt"),
        ("{%- if message['role'] ==", "{%- if message['role'] == 'system' -%}{{- raise_exception('no') -}}{%- elif "
         "message['role'] ==", "the chat template has no system role"),
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
    with pytest.raises(ExportError, match="of 72 chats, 0 are equal"):
        run_in(tmp_path)


def test_num_ctx_above_the_models_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(ExportError, match="num_ctx is 2048, the model was made for 1024 tokens"):
        run_in(tmp_path, SETTINGS.model_copy(update={"num_ctx": 2048}))


def test_missing_gguf_is_named(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(ExportError, match=r"model-F16\.gguf"):
        run_in(tmp_path, SETTINGS.model_copy(update={"quantization": "F16"}))
