from pathlib import Path

import pytest
from go_comparison import CHATML, PLAIN_TOOLS, SMOKE, chat_of

from finetune.errors import ExportError
from finetune.export.renderer import prefers_jinja, serve_by_go, serve_by_jinja

QWEN2 = Path("chat_templates/qwen2.jinja").read_text(encoding="utf-8")
# What a TEMPLATE of this project may hold: functions, calls and results, or less.
GO = '{{ $.Tools }}{{ .ToolCalls }}{{ eq .Role "tool" }}'
GO_WITHOUT_RESULTS = "{{ $.Tools }}{{ .ToolCalls }}"
JINJA = "{{ tools }}{{ m.tool_calls }}{{ message['role'] == 'tool' }}"


@pytest.mark.parametrize(
    ("embedded", "go_text", "preferred"),
    [
        ("{{ messages }}", "", False),
        ("{{ tools }}", "", True),
        ("{# tool_call #}", "", True),
        ("{{ tool }}{{ functions }}", "", False),
        ("{{ tools }}", GO, False),
        (JINJA, GO, False),
        (JINJA, GO_WITHOUT_RESULTS, True),
        (JINJA, "{{ $.Tools }}", True),
        ("{{ tools }}", "{{ $.Tools }}", False),
        (JINJA.replace("message['role'] == 'tool'", "''"), GO_WITHOUT_RESULTS, False),
        (JINJA.replace("message['role'] == 'tool'", "'ipython'"), GO_WITHOUT_RESULTS, True),
        (JINJA.replace("message['role'] == 'tool'", 'message.role == "tool"'), GO_WITHOUT_RESULTS, True),
        ("'<think>' '</think>'", "", True),
        ("'<think>'", "", False),
        ("{{ message.content.split('</think>')[-1] }}", "", True),
        ("{{ message.content.split('</think>')[-1] }}{{ reasoning_content }}", "", False),
        # Functions and thinking against functions: the TEMPLATE stays only if it has the whole round trip alone.
        ("{{ tools }}<think></think>", GO, False),
        (JINJA + "<think></think>", GO, True),
        ("{{ tools }}<think></think>", "{{ $.Tools }}", True),
        # Thinking alone is as much as functions alone.
        ("<think></think>", GO, False),
    ],
)
def test_ollamas_choice(embedded: str, go_text: str, preferred: bool) -> None:
    assert prefers_jinja(embedded, go_text) == preferred


def test_go_serves_functions_where_it_can() -> None:
    served = serve_by_go(chat_of(SMOKE), SMOKE, add_bos=True)
    assert (served.roles, served.requires) == (("system", "user", "assistant", "tool"), "")
    assert (served.tools, served.tool_calls, served.functions_in_go) == (True, True, True)
    plain = serve_by_go(chat_of(CHATML), CHATML, add_bos=False)
    assert (plain.tools, plain.tool_calls, plain.functions_in_go) == (False, False, True)


@pytest.mark.parametrize("template", [PLAIN_TOOLS, QWEN2], ids=["spaces", "qwen2"])
def test_jinja_serves_functions_that_go_cannot_write(template: str) -> None:
    with pytest.raises(ExportError, match="by tojson with spaces after commas and colons") as raised:
        serve_by_go(chat_of(template), template, add_bos=False)
    assert raised.value.remedy.endswith("or set ollama_modelfile.renderer to jinja in params.yaml (Ollama 0.30.0)")
    served = serve_by_jinja(chat_of(template), template, add_bos=False)
    assert (served.tools, served.tool_calls, served.functions_in_go, served.requires) == (True, True, False, "0.30.0")
    assert served.roles == ("system", "user", "assistant", "tool")
    assert ".Tools" not in served.text
    assert ".ToolCalls" not in served.text
    assert '"tool"' not in served.text


def test_jinja_is_not_named_where_it_would_not_do() -> None:
    trimmed = PLAIN_TOOLS.replace("message['content']", "message['content'] | trim")
    with pytest.raises(ExportError, match="by tojson with spaces") as raised:
        serve_by_go(chat_of(trimmed), trimmed, add_bos=False)
    assert "jinja in params" not in raised.value.remedy
    with pytest.raises(ExportError, match=r"needs a TEMPLATE for chats without functions .* message is trimmed"):
        serve_by_jinja(chat_of(trimmed), trimmed, add_bos=False)


def test_jinja_that_ollama_would_not_use_is_refused() -> None:
    with pytest.raises(ExportError, match=r"would not render the chat template inside the GGUF[^|]*renderer to go"):
        serve_by_jinja(chat_of(CHATML), CHATML, add_bos=False)


@pytest.mark.parametrize("words", ["{# no tools #}", "{# no tool_call #}", "{# <think></think> #}"])
def test_a_template_that_ollama_would_ignore_for_its_words_is_refused(words: str) -> None:
    with pytest.raises(ExportError, match="would ignore the TEMPLATE and render the chat template in the GGUF"):
        serve_by_go(chat_of(CHATML), CHATML + words, add_bos=False)
    assert serve_by_go(chat_of(CHATML), CHATML + "{# tool calls #}", add_bos=False).tools is False
