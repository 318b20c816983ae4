import io
import sys
from pathlib import Path

import pytest
import tiny_gguf

from finetune.chat import Conversation, main, open_conversation, talk
from finetune.errors import DataError, ExportError
from finetune.export.modelfile import Modelfile, render_modelfile

TURN = '{{ "<|" }}{{ .Role }}{{ "|>\\n" }}{{ .Content }}{{ "\\n" }}'
GO_TEXT = f'{{{{- range .Messages }}}}{TURN}{{{{ end }}}}{{{{ "<|assistant|>\\n" }}}}'


@pytest.fixture(scope="module")
def modelfile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    tokenizer = tiny_gguf.train_tokenizer()
    tiny_gguf.write_gguf(folder / "model.gguf", tokenizer, "unused", add_bos=True, answer="a")
    served = Modelfile("model.gguf", GO_TEXT, "S", 64, 0.0, 0.9, 1.0, ("</s>",))
    (folder / "Modelfile").write_text(render_modelfile(served, context_tokens=1024), encoding="utf-8")
    return folder / "Modelfile"


@pytest.fixture
def conversation(modelfile: Path) -> Conversation:
    return open_conversation(modelfile)


def test_prompt_is_the_modelfiles(conversation: Conversation) -> None:
    assert "".join(conversation.answer("Q")) == "a"
    conversation.turns.append({"role": "user", "content": "R"})
    text = b"<s><|system|>\nS\n<|user|>\nQ\n<|assistant|>\na\n<|user|>\nR\n<|assistant|>\n"
    assert conversation.prompt_ids() == conversation.model.tokenize(text, add_bos=False, special=True)


def test_oldest_turns_are_forgotten_when_num_ctx_is_full(conversation: Conversation) -> None:
    for number in range(12):
        assert "".join(conversation.answer(f"{number}")) == "a"
    assert conversation.turns[0]["role"] == "user"
    assert conversation.turns[-2:] == [{"role": "user", "content": "11"}, {"role": "assistant", "content": "a"}]
    assert 2 <= len(conversation.turns) < 24
    assert len(conversation.prompt_ids()) <= 64


def test_a_question_longer_than_num_ctx_is_refused_and_forgotten(conversation: Conversation) -> None:
    with pytest.raises(ExportError, match=r"the question takes \d+ tokens, num_ctx is 64"):
        list(conversation.answer("!?" * 64))
    assert conversation.turns == []


def test_talk_ends_at_exit(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n\n/exit\nnot asked\n"))
    talk(conversation)
    assert capsys.readouterr().out == "a\n"
    assert len(conversation.turns) == 2


def test_ask_writes_one_answer(
    modelfile: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["chat", str(modelfile), "--ask", "Hello"])
    main()
    assert capsys.readouterr().out == "a\n"


def test_missing_files_name_the_remedy(tmp_path: Path, modelfile: Path) -> None:
    with pytest.raises(DataError, match="the Modelfile is missing"):
        open_conversation(tmp_path / "Modelfile")
    (tmp_path / "Modelfile").write_bytes(modelfile.read_bytes())
    with pytest.raises(DataError, match="the GGUF that FROM names is missing"):
        open_conversation(tmp_path / "Modelfile")
