from dataclasses import replace
from pathlib import Path

import llama_cpp
import pytest
import tiny_gguf

from finetune.chat_template import SERVING_TEMPLATE, read_template
from finetune.data.encoding.chat import flatten
from finetune.data.encoding.chat import render as render_as_trained
from finetune.data.record import Message, make_record
from finetune.data.vocabulary.tokenizer_files import load_chat
from finetune.errors import DataError, ExportError
from finetune.export.gguf_vocab import GgufFacts, ends_generation, open_vocab, read_facts
from finetune.export.parity import ParityReport, Trained, compare_prompts, read_trained, require_parity
from finetune.export.parity_chats import ParityChat, parity_chats
from finetune.export.template import derive_template, go_template
from finetune.tools import GOTEMPLATE, tool_path

SMOKE = Path("recipes/smoke/chat_template.jinja").read_text(encoding="utf-8")
ROLES = ["system", "user", "assistant", "tool"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    tokenizer = tiny_gguf.train_tokenizer()
    tiny_gguf.write_tokenizer(folder / "tokenizer", tokenizer, SMOKE)
    serving = (folder / "tokenizer" / "chat_template.jinja").read_text(encoding="utf-8")
    for add_bos in (True, False):
        tiny_gguf.write_gguf(folder / f"add_bos_{add_bos}.gguf", tokenizer, serving, add_bos=add_bos)
    return folder


def opened(made: Path, add_bos: bool) -> tuple[Trained, llama_cpp.Llama, GgufFacts, str]:
    gguf = made / f"add_bos_{add_bos}.gguf"
    vocab = open_vocab(gguf)
    linear = derive_template(read_template(made / "tokenizer", SERVING_TEMPLATE))
    return read_trained(made / "tokenizer"), vocab, read_facts(vocab, gguf), go_template(linear, add_bos=add_bos)


def report_of(trained: Trained, vocab: llama_cpp.Llama, facts: GgufFacts, text: str) -> ParityReport:
    chats = parity_chats(ROLES, "Tu es l'assistant.")
    return compare_prompts(chats, trained, vocab, facts, text, tool_path(GOTEMPLATE))


def test_chats_cover_every_role_and_length() -> None:
    chats = parity_chats(ROLES, "Be kind.")
    assert len(chats) == 72
    assert max(len([m for m in chat.messages if m["role"] == "user"]) for chat in chats) == 5
    assert {message["role"] for chat in chats for message in chat.messages} == set(ROLES)
    assert len(parity_chats(["user", "assistant"], "")) == 42


def test_facts_of_the_gguf(made: Path) -> None:
    _, vocab, facts, _ = opened(made, True)
    assert replace(facts, chat_template="") == GgufFacts(True, 1024, "<s>", "</s>", "")
    assert facts.chat_template.startswith("{{- bos_token -}}")
    assert ends_generation(vocab, "</s>\n")
    assert not ends_generation(vocab, "\n</s>")
    assert not ends_generation(vocab, "")


@pytest.mark.parametrize("add_bos", [True, False])
def test_parity_of_the_derived_template(made: Path, add_bos: bool) -> None:
    report = report_of(*opened(made, add_bos))
    require_parity(report, made)
    assert (report.chats, report.equal_embedded, report.equal_ollama, report.share()) == (72, 72, 72, 1.0)


def test_trained_ids_begin_with_one_bos_and_know_the_markers(made: Path) -> None:
    trained, *_ = opened(made, True)
    text, ids = trained.prompt(parity_chats(ROLES, "")[-1])
    assert text.startswith("<s><|user|>\nLundi ?\n<|assistant|>\n<tool_call>")
    assert (ids[0], ids[1], ids.count(0)) == (0, 4, 1)


def test_the_gates_trained_prompt_is_rendered_by_the_code_that_trains(tmp_path: Path) -> None:
    seen = "{{ pad_token }}{{ tools is defined }}{{ documents is defined }}{{ unk_token is defined }}"
    tiny_gguf.write_tokenizer(tmp_path / "tokenizer", tiny_gguf.train_tokenizer(), SMOKE + seen)
    question = make_record(source="s", messages=(Message("user", "Hello"),))
    chat = load_chat(tmp_path / "tokenizer")
    trained = render_as_trained(chat.template, flatten(question), "here", add_generation_prompt=True).text
    text, ids = read_trained(tmp_path / "tokenizer").prompt(ParityChat("plain", tuple(flatten(question))))
    assert text == trained == "<s><|user|>\nHello\n<|assistant|>\n<pad>TrueTrueFalse"
    assert ids == chat.tokenizer.encode(trained, add_special_tokens=False).ids


def test_gate_fails_when_the_go_template_lacks_a_newline(made: Path) -> None:
    trained, vocab, facts, text = opened(made, True)
    wrong = text.replace('{{- end }}{{ "<|assistant|>\\n" }}', '{{- end }}{{ "<|assistant|>" }}')
    report = report_of(trained, vocab, facts, wrong)
    assert (report.equal_embedded, report.equal_ollama) == (72, 0)
    with pytest.raises(ExportError, match=r"chat 'plain', ollama, token \d+ is the first that differs\n.*\\n'"):
        require_parity(report, made)


def test_gate_fails_when_the_embedded_template_has_a_newline_more(made: Path) -> None:
    trained, vocab, facts, text = opened(made, True)
    report = report_of(trained, vocab, replace(facts, chat_template=facts.chat_template + r"{{- '\n' -}}"), text)
    assert (report.equal_embedded, report.equal_ollama, report.share()) == (0, 72, 0.5)
    with pytest.raises(ExportError, match="chat 'plain', embedded, token"):
        require_parity(report, made)


def test_gate_fails_on_a_second_bos(made: Path) -> None:
    trained, vocab, facts, text = opened(made, True)
    report = report_of(trained, vocab, facts, '{{ "<s>" }}' + text)
    assert report.equal_ollama == 0
    with pytest.raises(ExportError, match="ollama, token 1 is the first that differs"):
        require_parity(report, made)


def test_missing_files_name_the_stage_that_makes_them(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="dvc repro quantize_gguf"):
        open_vocab(tmp_path / "model.gguf")
    with pytest.raises(DataError, match="dvc repro tokenizer"):
        read_trained(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF, or not")
    with pytest.raises(ExportError, match=r"llama\.cpp cannot open it"):
        open_vocab(tmp_path / "model.gguf")
