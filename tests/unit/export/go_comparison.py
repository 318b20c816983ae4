"""A Jinja template -> whether its derived Go TEMPLATE writes the same prompts in the compiled Go program."""

from __future__ import annotations

from pathlib import Path

from finetune.chat_template import ChatTemplate, compile_template
from finetune.export.gotemplate import GoRequest, render_go
from finetune.export.parity_chats import parity_chats
from finetune.export.template import derive_template, go_template
from finetune.tools import GOTEMPLATE, tool_path

SMOKE = Path("recipes/smoke/chat_template.jinja").read_text(encoding="utf-8")
CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Functions as most base models have them: with spaces in their JSON, which Ollama never writes.
PLAIN_TOOLS = "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}" + CHATML.replace(
    "+ '<|im_end|>'",
    "}}{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}{{ '<|im_end|>'",
)


def chat_of(template: str) -> ChatTemplate:
    return compile_template(template, {"bos_token": "<s>", "eos_token": "</s>"}, "chat_template.jinja")


def same_as_go(template: str) -> int:
    """Compare Go with Jinja on every chat of the gate, and return their number."""
    chat = chat_of(template)
    linear = derive_template(chat)
    written = {"tools": linear.definitions is not None, "tool_calls": linear.calls is not None}
    chats = parity_chats(linear.role_names(), "Be kind." if "system" in linear.role_names() else "", **written)
    requests = [GoRequest(system=item.system, messages=item.messages, tools=item.tools) for item in chats]
    texts = render_go(tool_path(GOTEMPLATE), go_template(linear, add_bos=False), requests)
    assert texts == [
        chat.render(item.full_messages(), add_generation_prompt=True, tools=item.full_tools()).text for item in chats
    ]
    return len(texts)
