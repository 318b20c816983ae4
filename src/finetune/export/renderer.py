"""A chat template and `ollama_modelfile.renderer` -> the TEMPLATE, and the proof that Ollama uses what was chosen.

Since 0.30 Ollama holds a Modelfile's TEMPLATE against the GGUF's own chat template, and renders with the one that has
more capabilities (server/images.go, shouldPreferChatTemplate). It judges by words: a chat template that says "tools" or
"tool_call" has functions, one with <think> tags has thinking; a TEMPLATE has functions when it names .Tools. So the
choice is checked here, with Ollama's own words, as they are in 0.33.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune.chat_template import SERVING_TEMPLATE, ChatTemplate, writes_tool_calls, writes_tools
from finetune.errors import ExportError
from finetune.export.template import derive_template, go_template, writes_results

# The first version that renders a GGUF's own chat template.
JINJA_REQUIRES = "0.30.0"
RENDERER = "params.yaml: ollama_modelfile.renderer"
TOOL_WORDS = ("tools", "tool_call")
CALL_WORDS = ("tool_calls", "assistant_tool_call")
RESULT_WORDS = (
    *("tool_response", "tool_results", "ipython", "message.role == 'tool'", 'message.role == "tool"'),
    *("role'] == 'tool'", 'role\'] == "tool"', "role\"] == 'tool'", 'role"] == "tool"'),
)
THINK_SPLITS = ("content.split('</think>')", 'content.split("</think>")')
NO_THINK_WORDS = ("reasoning_content", "<SPECIAL_12>")


@dataclass(frozen=True)
class Served:
    """The TEMPLATE's text, and what is rendered by whichever renderer: roles, functions, answers with calls.

    `requires`: the oldest version of Ollama that serves so, or nothing.
    """

    text: str
    roles: tuple[str, ...]
    requires: str
    tools: bool
    tool_calls: bool
    functions_in_go: bool


def serve_by_go(chat: ChatTemplate, embedded: str, *, add_bos: bool) -> Served:
    """Derive the whole TEMPLATE; `embedded` is the GGUF's template. Raises ExportError where Go cannot express it.

    The error names the other renderer where that one would do.
    """
    try:
        linear = derive_template(chat)
        text = go_template(linear, add_bos=add_bos)
    except ExportError as fault:
        if not _jinja_would_do(chat, embedded, add_bos=add_bos):
            raise
        remedy = f"{fault.remedy}; or set ollama_modelfile.renderer to jinja in params.yaml (Ollama {JINJA_REQUIRES})"
        raise ExportError(fault.what, fault.where, remedy) from None
    if prefers_jinja(embedded, text):
        raise ExportError(
            f"Ollama {JINJA_REQUIRES} and later would ignore the TEMPLATE and render the chat template in the GGUF, "
            f"which by its words can do more ({', '.join(_telling_words(embedded))})",
            SERVING_TEMPLATE,
            "leave those words out of the chat template, or set ollama_modelfile.renderer to jinja in params.yaml",
        )
    roles = tuple(linear.role_names())
    return Served(text, roles, "", linear.definitions is not None, linear.calls is not None, functions_in_go=True)


def serve_by_jinja(chat: ChatTemplate, embedded: str, *, add_bos: bool) -> Served:
    """Derive a TEMPLATE without functions, beside which Ollama renders the GGUF's own; raises ExportError otherwise."""
    try:
        linear = derive_template(chat, tools=False)
        text = go_template(linear, add_bos=add_bos)
    except ExportError as fault:
        what = "renderer jinja needs a TEMPLATE for chats without functions beside the GGUF's own, and there is none"
        raise ExportError(f"{what}: {fault.what}", fault.where, fault.remedy) from None
    if not prefers_jinja(embedded, text):
        raise ExportError(
            "Ollama would not render the chat template inside the GGUF: it prefers that one only where it has more "
            f"capabilities than the TEMPLATE, which it looks for by words ({', '.join(TOOL_WORDS)}, <think>)",
            RENDERER,
            "set ollama_modelfile.renderer to go",
        )
    roles = (*linear.role_names(), *(("tool",) if writes_results(chat) else ()))
    return Served(text, roles, JINJA_REQUIRES, writes_tools(chat), writes_tool_calls(chat), functions_in_go=False)


def prefers_jinja(embedded: str, go_text: str) -> bool:
    """Whether Ollama from 0.30 on renders the GGUF's template `embedded` instead of the TEMPLATE `go_text`."""
    jinja, go = _jinja_capabilities(embedded), {"tools"} if ".Tools" in go_text else set()
    if len(jinja) > len(go):
        return not _go_round_trip(go_text) or _jinja_round_trip(embedded)
    return jinja == go == {"tools"} and _jinja_round_trip(embedded) and not _go_round_trip(go_text)


def _jinja_capabilities(embedded: str) -> set[str]:
    tags = "<think>" in embedded and "</think>" in embedded
    stripped = _any(THINK_SPLITS, embedded) and not _any(NO_THINK_WORDS, embedded)
    found = {"tools": _any(TOOL_WORDS, embedded), "thinking": tags or stripped}
    return {name for name, there in found.items() if there}


def _jinja_round_trip(embedded: str) -> bool:
    return _any(CALL_WORDS, embedded) and _any(RESULT_WORDS, embedded)


def _go_round_trip(go_text: str) -> bool:
    """Whether a TEMPLATE of this project has functions, calls and results, by the words that Ollama looks for."""
    results = ('eq .Role "tool"', "tool_response", "TOOL_RESULTS")
    return ".Tools" in go_text and ".ToolCalls" in go_text and _any(results, go_text)


def _telling_words(embedded: str) -> list[str]:
    return [word for word in (*TOOL_WORDS, "<think>", *THINK_SPLITS) if word in embedded]


def _any(words: tuple[str, ...], text: str) -> bool:
    return any(word in text for word in words)


def _jinja_would_do(chat: ChatTemplate, embedded: str, *, add_bos: bool) -> bool:
    try:
        serve_by_jinja(chat, embedded, add_bos=add_bos)
    except ExportError:
        return False
    return True
