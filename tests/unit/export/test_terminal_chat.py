import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_gguf

from finetune.chat import Conversation, main, open_conversation, say, shown, talk
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
    turns = [*conversation.turns, {"role": "user", "content": "R"}]
    text = b"<s><|system|>\nS\n<|user|>\nQ\n<|assistant|>\na\n<|user|>\nR\n<|assistant|>\n"
    assert conversation.prompt_ids(turns) == conversation.served.llama.tokenize(text, add_bos=False, special=True)


def test_the_prompt_is_the_ggufs_own_where_the_modelfile_requires_it(tmp_path: Path) -> None:
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    tiny_gguf.write_gguf(tmp_path / "model.gguf", tiny_gguf.train_tokenizer(), template, add_bos=True, answer="a")
    served = Modelfile("model.gguf", GO_TEXT, "S", 64, 0.0, 0.9, 1.0, ("</s>",), requires="0.30.0")
    (tmp_path / "Modelfile").write_text(render_modelfile(served, context_tokens=1024), encoding="utf-8")
    conversation = open_conversation(tmp_path / "Modelfile")
    assert "".join(conversation.answer("Q")) == "a"
    text = b"[system]S[user]Q[assistant]a[assistant]"
    assert conversation.prompt_ids(conversation.turns) == conversation.served.llama.tokenize(text, add_bos=False)


def test_oldest_turns_are_forgotten_when_num_ctx_is_full(conversation: Conversation) -> None:
    for number in range(12):
        assert "".join(conversation.answer(f"{number}")) == "a"
    assert conversation.turns[0]["role"] == "user"
    assert conversation.turns[-2:] == [{"role": "user", "content": "11"}, {"role": "assistant", "content": "a"}]
    assert 2 <= len(conversation.turns) < 24
    assert len(conversation.prompt_ids(conversation.turns)) <= 64


def test_a_question_longer_than_num_ctx_is_refused_and_the_talk_goes_on(conversation: Conversation) -> None:
    assert "".join(conversation.answer("Q")) == "a"
    before = list(conversation.turns)
    with pytest.raises(ExportError, match=r"the question takes \d+ tokens, num_ctx is 64"):
        list(conversation.answer("!?" * 64))
    assert conversation.turns == before


def test_an_answer_that_is_stopped_is_remembered_as_far_as_it_went(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def press_ctrl_c(ids: list[int]) -> Iterator[str]:
        yield "half"
        raise KeyboardInterrupt

    monkeypatch.setattr(conversation, "_complete", press_ctrl_c)
    say(conversation, "Q")
    assert capsys.readouterr().out == "half (stopped)\n"
    assert [turn["content"] for turn in conversation.turns] == ["Q", "half"]


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("up\x1b[A", r"control characters \(U\+001B\)"),
        ("\x00\x9f\x07", r"\(U\+0000, U\+0007, U\+009F\)"),
        (os.fsdecode(b"caf\xe9"), "bytes that are not UTF-8"),
    ],
)
def test_what_no_one_can_mean_is_not_asked(conversation: Conversation, question: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        say(conversation, question)
    assert conversation.turns == []


def test_an_answer_does_not_command_the_terminal() -> None:
    assert shown("a\x1b]0;x\x07\tb\n\x9b2J") == "a\\x1b]0;x\\x07\tb\n\\x9b2J"


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
    with pytest.raises(ExportError, match="the Modelfile is missing"):
        open_conversation(tmp_path / "Modelfile")
    (tmp_path / "Modelfile").write_bytes(modelfile.read_bytes())
    with pytest.raises(ExportError, match="the GGUF that FROM names is missing"):
        open_conversation(tmp_path / "Modelfile")
