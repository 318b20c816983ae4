from pathlib import Path

import pytest
from go_comparison import CHATML, SMOKE, chat_of, same_as_go

from finetune.errors import DataError, ExportError
from finetune.export.gotemplate import GoRequest, render_go
from finetune.export.linear_template import RoleForm
from finetune.export.template import derive_template, go_literal, go_template
from finetune.tools import GOTEMPLATE, tool_path

PLAIN = Path("recipes/dolores_v5/chat_template.jinja").read_text(encoding="utf-8")
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}" + CHATML
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content"
    " + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
INST_WITH_SYSTEM = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content"
    " + ' [/INST]' }}{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
AWKWARD = (
    "{{ bos_token }}{% for m in messages %}{{ '{{ `' + m.role + '` }}\"\"\" \\\\ %s \u00a0\u200d\U000e0041\t\r\n' }}"
    "{{ m.content + '{{- end -}}\n\"\"\"\n' }}{% endfor %}{% if add_generation_prompt %}{{ '}}🙂 ' }}{% endif %}"
)


def test_smoke_template_as_go_text() -> None:
    tools = '{{ range $number, $item := $.Tools }}{{ if $number }}{{ "," }}{{ end }}{{ json . }}{{ end }}'
    assert go_template(derive_template(chat_of(SMOKE)), add_bos=True) == (
        "{{- range $index, $message := .Messages }}\n"
        '{{- if and (eq $index 0) (ne .Role "system") }}{{ if $.Tools }}{{ "<|system|>\\nTools: [" }}'
        f'{tools}{{{{ "]\\n" }}}}{{{{ end }}}}{{{{ end }}}}\n'
        '{{- if eq .Role "system" }}{{ if and (eq $index 0) $.Tools }}{{ "<|system|>\\n" }}{{ .Content }}'
        f'{{{{ "\\n\\nTools: [" }}}}{tools}{{{{ "]\\n" }}}}'
        '{{ else }}{{ "<|system|>\\n" }}{{ .Content }}{{ "\\n" }}{{ end }}\n'
        '{{- else if eq .Role "user" }}{{ "<|user|>\\n" }}{{ .Content }}{{ "\\n" }}\n'
        '{{- else if eq .Role "assistant" }}{{ "<|assistant|>\\n" }}{{ if .ToolCalls }}'
        '{{ if .Content }}{{ .Content }}{{ "\\n<tool_call>{\\"name\\":\\"" }}{{ else }}<tool_call>{"name":"{{ end }}'
        "{{ range $number, $item := .ToolCalls }}"
        '{{ if $number }}{{ "}</tool_call>\\n<tool_call>{\\"name\\":\\"" }}{{ end }}'
        '{{ .Function.Name }}{{ "\\",\\"arguments\\":" }}{{ json .Function.Arguments }}{{ end }}'
        '{{ "}</tool_call></s>\\n" }}{{ else }}{{ .Content }}{{ "</s>\\n" }}{{ end }}\n'
        '{{- else if eq .Role "tool" }}{{ "<|tool|>\\n" }}{{ .Content }}{{ "\\n" }}\n'
        "{{- else }}{{ .RoleNotInTemplate }}\n"
        "{{- end }}\n"
        '{{- end }}{{ "<|assistant|>\\n" }}'
    )


def test_a_template_without_functions_as_go_text() -> None:
    assert go_template(derive_template(chat_of(SMOKE), tools=False), add_bos=True) == (
        "{{- range .Messages }}\n"
        '{{- if eq .Role "system" }}{{ "<|system|>\\n" }}{{ .Content }}{{ "\\n" }}\n'
        '{{- else if eq .Role "user" }}{{ "<|user|>\\n" }}{{ .Content }}{{ "\\n" }}\n'
        '{{- else if eq .Role "assistant" }}{{ "<|assistant|>\\n" }}{{ .Content }}{{ "</s>\\n" }}\n'
        "{{- else }}{{ .RoleNotInTemplate }}\n"
        "{{- end }}\n"
        '{{- end }}{{ "<|assistant|>\\n" }}'
    )


def test_go_text_writes_bos_only_when_the_server_does_not() -> None:
    linear = derive_template(chat_of(SMOKE))
    assert go_template(linear, add_bos=False) == '{{ "<s>" }}\n' + go_template(linear, add_bos=True)


def test_default_system_text_is_found() -> None:
    linear = derive_template(chat_of(DEFAULT_SYSTEM))
    assert linear.default_system == "<|im_start|>system\nYou help.<|im_end|>\n"
    assert linear.preamble == ""
    assert linear.roles[0] == RoleForm("system", "<|im_start|>system\n", "<|im_end|>\n")


def test_inst_template_has_neither_system_nor_generation_prompt() -> None:
    linear = derive_template(chat_of(INST))
    assert linear.roles == (RoleForm("user", "[INST] ", " [/INST]"), RoleForm("assistant", " ", "</s>"))
    assert (linear.bos, linear.generation_prompt) == ("<s>", "")


@pytest.mark.parametrize(
    "template", [SMOKE, CHATML, DEFAULT_SYSTEM, HEADERS, ZEPHYR, INST, AWKWARD], ids=lambda text: text[:20]
)
def test_go_writes_what_jinja_writes(template: str) -> None:
    assert same_as_go(template) >= 40


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (PLAIN.replace("message['content']", "message['content'] | trim"), "content of a system message is trimmed"),
        (INST_WITH_SYSTEM, "system message is merged into the user turn"),
        (CHATML.replace("message['content']", "(message['content'] | upper)"), "user message is dropped, moved or alt"),
        (CHATML.replace("message['content']", "(message['content'] | e)"), "content of a system message is escaped"),
        (CHATML.replace("{% for", "{{ messages[-1].content }}{% for"), "written more than once"),
        (CHATML.replace("'<|im_start|>' +", "('' if loop.first else '<|im_start|>') +"), "before the first user messa"),
        (CHATML.replace("+ '\n'}}", "+ ('' if loop.last else '\n')}}"), "before the first user message depends on"),
        (CHATML.replace("message['content']", "message['content'].split('</think>')[-1]"), "<think> text of earlier"),
        (CHATML.replace("message['role'] +", "message['role'] + ('2' if loop.index > 4 else '') +"), "on its place"),
        (CHATML.replace("{% for", "{% for message in messages if message.content %}{% endfor %}{% for").replace(
            "in messages %}{{", "in messages if message.content %}{{"), "an empty system message is treated apart"),
        (CHATML.replace("if add_generation_prompt", "if add_generation_prompt and messages[-1].role != 'assistant'"),
         "generation prompt or a prefix depends on the first or last role"),
        (CHATML.replace("'<|im_start|>' +", "('' if loop.previtem and loop.previtem.role == message.role else '+') +"),
         "neighbouring tool results are grouped"),
        (CHATML.replace("in messages %}", "in messages if loop is undefined and (message.role != 'system' or "
                        "message == messages[0]) %}"), "a later system message is moved, dropped"),
        ("{{ raise_exception('no') }}", "it refuses a chat of user: no"),
        ("{% for tool in tools %}{% endfor %}" + CHATML, "it refuses a chat of user: 'NoneType'"),
    ],
)  # fmt: skip
def test_a_template_that_is_not_linear_is_refused_with_the_reason(template: str, reason: str) -> None:
    with pytest.raises(ExportError, match=reason):
        derive_template(chat_of(template))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (CHATML + "{{ strftime_now('%d %b %Y') }}", "writes today's date"),
        # Not taken for a template without that role, as any other refusal is.
        (CHATML + "{% if messages[0].role == 'system' %}{{ strftime_now('%Y') }}{% endif %}", "writes today's date"),
        ("{% for %}", "not valid Jinja"),
    ],
)
def test_a_template_that_cannot_be_trained_with_is_refused(template: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        derive_template(chat_of(template))


def test_bos_of_the_server_alone_is_refused() -> None:
    with pytest.raises(ExportError, match="adds BOS to every prompt"):
        go_template(derive_template(chat_of(CHATML)), add_bos=True)


def test_a_role_without_form_is_an_error_when_serving() -> None:
    text = go_template(derive_template(chat_of(INST)), add_bos=True)
    request = GoRequest(system="", messages=[{"role": "system", "content": "a"}, {"role": "user", "content": "b"}])
    with pytest.raises(ExportError, match="can't evaluate field RoleNotInTemplate"):
        render_go(tool_path(GOTEMPLATE), text, [request])


def test_go_joins_neighbours_of_one_role_as_ollama_does() -> None:
    text = "{{ range .Messages }}[{{ .Role }}:{{ .Content }}]{{ end }}{{ .System }}"
    roles = [("system", "s"), ("user", "a"), ("USER", "b"), ("tool", "c"), ("tool", "d"), ("system", "t")]
    request = GoRequest(system="unused", messages=[{"role": role, "content": content} for role, content in roles])
    expected = "[system:s][user:a\n\nb][tool:c][tool:d][system:t]s\n\nt"
    assert render_go(tool_path(GOTEMPLATE), text, [request]) == [expected]


def test_go_literal_escapes_what_a_modelfile_would_drop() -> None:
    assert go_literal('a"\\\n\t\u00a0\u200d\U000e0041é`') == '"a\\"\\\\\\n\\t\\u00a0\\u200d\\U000e0041é`"'
