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
    chats = parity_chats(ROLES, "Tu es l'assistant.", tools=True, tool_calls=True)
    return compare_prompts(chats, trained, vocab, facts, text, tool_path(GOTEMPLATE))


def test_chats_cover_every_role_and_length() -> None:
    chats = parity_chats(ROLES, "Be kind.")
    assert len(chats) == 72
    assert max(len([m for m in chat.messages if m["role"] == "user"]) for chat in chats) == 5
    assert {message["role"] for chat in chats for message in chat.messages} == set(ROLES)
    assert len(parity_chats(["user", "assistant"], "")) == 42


def test_chats_with_functions_cover_what_clients_send() -> None:
    plain = len(parity_chats(ROLES, "Be kind."))
    chats = parity_chats(ROLES, "Be kind.", tools=True, tool_calls=True)
    assert len(chats) == 124
    assert not any(chat.tools for chat in chats[:plain])
    assert {len(chat.tools) for chat in chats[plain:]} == {0, 1, 2}
    assert any(chat.tools and chat.system for chat in chats)
    calls = [message["tool_calls"] for chat in chats for message in chat.messages if "tool_calls" in message]
    assert {len(several) for several in calls} == {1, 2}
    assert {message["name"] for chat in chats for message in chat.messages if "name" in message} == {
        "get_hours",
        "book_repair",
        "now",
    }
    assert sum(chat.has_functions() for chat in chats) == 55
    assert len(parity_chats(["user", "assistant"], "", tools=True)) == 42 + 22


def test_facts_of_the_gguf(made: Path) -> None:
    _, vocab, facts, _ = opened(made, True)
    assert replace(facts, chat_template="") == GgufFacts(True, 1024, "<s>", "</s>", "")
    assert facts.chat_template == (made / "tokenizer" / "chat_template.jinja").read_text(encoding="utf-8")
    assert ends_generation(vocab, "</s>\n")
    assert not ends_generation(vocab, "\n</s>")
    assert not ends_generation(vocab, "")


@pytest.mark.parametrize("add_bos", [True, False])
def test_parity_of_the_derived_template(made: Path, add_bos: bool) -> None:
    report = report_of(*opened(made, add_bos))
    require_parity(report, made)
    assert (report.chats, report.equal_embedded, report.equal_ollama, report.share()) == (124, 124, 124, 1.0)


def test_trained_ids_begin_with_one_bos_and_know_the_markers(made: Path) -> None:
    trained, *_ = opened(made, True)
    text, ids = trained.prompt(parity_chats(ROLES, "", tools=True, tool_calls=True)[-1])
    assert text.startswith('<s><|system|>\nTools: [{"type":"function","function":{"name":"get_hours",')
    assert "<|assistant|>\n<tool_call>" in text
    assert (ids[0], ids[1], ids.count(0)) == (0, 3, 1)


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
    assert (report.equal_embedded, report.equal_ollama) == (124, 0)
    with pytest.raises(ExportError, match=r"chat 'plain', ollama, token \d+ is the first that differs\n.*\\n'"):
        require_parity(report, made)


def test_gate_fails_when_the_embedded_template_has_a_newline_more(made: Path) -> None:
    trained, vocab, facts, text = opened(made, True)
    report = report_of(trained, vocab, replace(facts, chat_template=facts.chat_template + r"{{- '\n' -}}"), text)
    assert (report.equal_embedded, report.equal_ollama, report.share()) == (0, 124, 0.5)
    with pytest.raises(ExportError, match="chat 'plain', embedded, token"):
        require_parity(report, made)


@pytest.mark.parametrize("add_bos", [True, False])
def test_chats_with_functions_are_left_to_the_gguf_where_the_template_has_none(made: Path, add_bos: bool) -> None:
    trained, vocab, facts, _ = opened(made, add_bos)
    linear = derive_template(read_template(made / "tokenizer", SERVING_TEMPLATE), tools=False)
    chats = parity_chats(ROLES, "Be kind.", tools=True, tool_calls=True)
    text, program = go_template(linear, add_bos=add_bos), tool_path(GOTEMPLATE)
    report = compare_prompts(chats, trained, vocab, facts, text, program, functions_in_go=False)
    assert (report.chats, report.ollama_chats) == (124, 69)
    assert (report.equal_embedded, report.equal_ollama, report.share()) == (124, 69, 1.0)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('{{ "]\\n" }}', '{{ "]" }}'),
        ("{{ json . }}", "{{ json .Function }}"),
        ("{{ json . }}", "{{ . }}"),
        ('{{ if $number }}{{ "," }}{{ end }}', '{{ if $number }}{{ ", " }}{{ end }}'),
        ("{{ json .Function.Arguments }}", "{{ .Function.Arguments }} "),
        ('{{ else }}<tool_call>{"name":"', '{{ else }}<tool_call>{"name": "'),
        ('}</tool_call></s>\\n"', '}</tool_call>\\n"'),
        ("and (eq $index 0) $.Tools", "and (ne $index 0) $.Tools"),
    ],
)
def test_gate_fails_when_go_writes_functions_otherwise(made: Path, old: str, new: str) -> None:
    trained, vocab, facts, text = opened(made, True)
    assert old in text
    report = report_of(trained, vocab, facts, text.replace(old, new))
    assert report.equal_embedded == 124
    assert 69 <= report.equal_ollama < 124
    with pytest.raises(ExportError, match="ollama, token"):
        require_parity(report, made)


def test_gate_fails_without_bos(made: Path) -> None:
    trained, vocab, facts, _ = opened(made, False)
    linear = derive_template(read_template(made / "tokenizer", SERVING_TEMPLATE))
    report = report_of(trained, vocab, facts, go_template(linear, add_bos=True))
    assert (report.equal_embedded, report.equal_ollama) == (124, 0)


def test_gate_fails_when_the_embedded_template_has_another_stop_or_bos(made: Path) -> None:
    trained, vocab, facts, text = opened(made, True)
    # Chats without an answer have no stop.
    for old, new, equal in (("eos_token", "'</s >'", 66), ("bos_token", "''", 0), ("bos_token", "bos_token * 2", 0)):
        wrong = replace(facts, chat_template=facts.chat_template.replace(old, new))
        report = report_of(trained, vocab, wrong, text)
        assert (report.equal_embedded, report.equal_ollama) == (equal, 124)
        with pytest.raises(ExportError, match="embedded, token"):
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
    with pytest.raises(ExportError, match=r"llama\.cpp cannot open it|GGUF version"):
        open_vocab(tmp_path / "model.gguf")
