import pytest
from go_comparison import CHATML, chat_of, same_as_go

from finetune.errors import ExportError
from finetune.export.template import derive_template, go_template

COMPACT_TOOL = (
    "{{ t | tojson(separators=(',', ':')) | replace('<', '\\\\u003c') | replace('>', '\\\\u003e')"
    " | replace('&', '\\\\u0026') }}"
)
# Where the functions stand, and how: a block of their own before or behind the system message, or inside it; whole
# definitions, the function alone or its parts; calls of a role of their own shape.
OWN_BLOCK = "{% if tools %}{{ '[F]' }}{% for t in tools %}" + COMPACT_TOOL + "{% endfor %}{{ '[/F]\n' }}{% endif %}"
FUNCTIONS = (
    "{% if tools %}{% for t in tools %}\n- " + COMPACT_TOOL.replace("t |", "t.function |") + "{% endfor %}\n{% endif %}"
)
PARTS = (
    "{% for t in tools or [] %}## {{ t.function.name }}\n{{ t.function.description }}\n"
    + COMPACT_TOOL.replace("t |", "t.function.parameters |")
    + "\n{% endfor %}"
)
INSIDE = CHATML.replace(
    "'<|im_end|>'", "(inner if tools and loop.first and message.role == 'system' else '') + '<|im_end|>'"
)
BEHIND = CHATML.replace("+ '\n'}}", "+ '\n' + (inner if loop.first and message.role == 'system' else '') }}")
CALLING = CHATML.replace(
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}",
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] }}{% if message.tool_calls %}{{ '[CALLS]' }}"
    "{% for c in message.tool_calls %}{{ '' if loop.first else ';' }}"
    + COMPACT_TOOL.replace("t |", "c.function |")
    + "{% endfor %}{{ '[/CALLS]' }}{% endif %}{{ '<|im_end|>' + '\n'}}",
)
SET_INNER = "{% set inner %}" + FUNCTIONS + "{% endset %}"


@pytest.mark.parametrize(
    "template",
    [
        OWN_BLOCK + CHATML,
        PARTS + CHATML,
        CALLING,
        SET_INNER + "{% if tools and messages[0].role != 'system' %}{{ '<|im_start|>system\nHelp.' + inner }}"
        "{{ '<|im_end|>\n' }}{% endif %}" + INSIDE,
        SET_INNER + "{% if messages[0].role != 'system' %}{{ inner }}{% endif %}" + BEHIND,
        OWN_BLOCK + CALLING,
    ],
    ids=["own block", "parts", "calls alone", "inside the system message", "behind it", "block and calls"],
)
def test_go_writes_the_functions_that_jinja_writes(template: str) -> None:
    assert same_as_go(template) >= 65


OTHERWISE = "not as Ollama's JSON, or more than once"
LIST = "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
IN_FIRST = CHATML.replace(
    "message['content'] +", "(t if tools and loop.first and message.role == 'user' else '') + message['content'] +"
)
IN_LAST = CHATML.replace(
    "{{'<|im", "{% if tools and message == (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}"
    "{% for t in tools %}" + COMPACT_TOOL + "{% endfor %}{% endif %}{{'<|im"
)  # fmt: skip


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (LIST + CHATML, "by tojson with spaces after commas and colons, where Ollama writes none"),
        (LIST.replace("tojson", "tojson(indent=4)") + CHATML, r"by tojson\(indent=4\)"),
        (LIST.replace("tojson", "tojson(indent=2)") + CHATML, r"by tojson\(indent=2\)"),
        (LIST.replace("tojson", "tojson(ensure_ascii=true)") + CHATML, r"by tojson\(ensure_ascii=True\)"),
        (LIST.replace("tojson", "string") + CHATML, "as Python prints a dictionary"),
        (LIST.replace("tojson", "tojson(separators=(',', ':'))") + CHATML, "with <, > and & as they are"),
        (LIST.replace("tojson", "tojson(sort_keys=true)") + CHATML, OTHERWISE),
        (OWN_BLOCK + OWN_BLOCK + CHATML, OTHERWISE),
        (CALLING.replace(" | replace('&', '\\\\u0026')", ""), OTHERWISE),
        (CALLING.replace("{{ c.function |", "{{ c.function.name }}{{ c.function.arguments | tojson |"), OTHERWISE),
        ("{% set t %}{% for t in tools or [] %}" + COMPACT_TOOL + "{% endfor %}{% endset %}" + IN_FIRST,
         "the function definitions stand inside the first user message"),
        (IN_LAST, "the function definitions stand with the last user message, and move with every turn"),
        (OWN_BLOCK.replace("'[/F]\n'", "tools | length") + CHATML, "the function definitions depends on their n"),
        (OWN_BLOCK.replace("if tools", "if tools and messages[0].role != 'system'") + CHATML,
         "the function definitions are written otherwise beside a system message"),
        (OWN_BLOCK + CHATML.replace("'<|im_end|>'", "('' if tools and loop.index == 3 else '<|im_end|>')"),
         "with functions, the text around a message depends on its place"),
        (CALLING.replace("'[/CALLS]'", "message.tool_calls | length"), "an assistant's calls depends on their"),
        (CALLING.replace("message['content'] }}", "('' if message.tool_calls else message['content']) }}"),
         "the text beside an assistant's calls is dropped, moved or altered"),
        (CALLING.replace("message['content'] }}", "message['content'] | trim if message.tool_calls else "
                         "message['content'] }}"), "an assistant's calls depends on what stands beside them"),
        (CHATML.replace("message['role'] +", "message['role'] + (message.name or '') +"),
         "a tool's result is written with its function's name or its call's id"),
        (CHATML.replace("message['role'] +", "message['role'] + (message.tool_call_id or '') +"),
         "a tool's result is written with its function's name or its call's id"),
    ],
)  # fmt: skip
def test_functions_that_go_cannot_write_are_refused_with_the_construct(template: str, reason: str) -> None:
    with pytest.raises(ExportError, match=reason):
        derive_template(chat_of(template))


def test_ollama_finds_calls_by_the_plain_text_that_opens_them() -> None:
    opening = "{{ if .ToolCalls }}{{ if .Content }}{{ .Content }}{{ %s }}{{ else }}%s{{ end }}"
    assert opening % ('"[CALLS]{\\"name\\":\\""', '[CALLS]{"name":"') in go_template(
        derive_template(chat_of(CALLING)), add_bos=False
    )
    # Text that Go or a Modelfile would take for something else stays in an action.
    braces = CALLING.replace("[CALLS]", "{{'{{'}}[CALLS]").replace("{{ '{{'{{'}}[CALLS]' }}", "{{ '{' + '{[CALLS]' }}")
    assert '{{ else }}{{ "{{[CALLS]{\\"name\\":\\"" }}{{ end }}' in go_template(
        derive_template(chat_of(braces)), add_bos=False
    )
