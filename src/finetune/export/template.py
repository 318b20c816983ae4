"""A Jinja chat template -> the Go TEMPLATE of a Modelfile that writes the same prompts, or a refusal with the reason.

The Jinja is probed, not parsed: it renders chats of recognisable contents, and what stands around each content is
that role's prefix and suffix; function definitions and calls likewise. The result is a linear form, which is then
compared with the Jinja on many chats: a template that is not linear is refused with the chat that shows it. Ollama's
own rules, which no TEMPLATE can change: neighbours of one role are merged into one message (tool results excepted), so
chats with such neighbours are not compared, and BOS is added by the GGUF's metadata.
"""

from __future__ import annotations

from collections.abc import Mapping

from finetune.chat_template import SERVING_TEMPLATE, ChatTemplate, writes_tool_calls, writes_tools
from finetune.errors import ExportError
from finetune.export.comparisons import compare
from finetune.export.linear_template import CALL_SLOTS, DEFINITION_SLOTS, CallForm, Item, LinearTemplate, RoleForm
from finetune.export.probes import pieces, probe, without_end, without_start, writes
from finetune.export.tool_probes import check_results, derive_calls, derive_definitions


def derive_template(chat: ChatTemplate, *, tools: bool = True) -> LinearTemplate:
    """The linear form of a chat template; raises ExportError naming what is not linear, with an example.

    `tools=False` leaves out function definitions, calls and results, for a TEMPLATE that is used for other chats.
    """
    user_suffix = pieces(chat, "user")[-1]
    assistant_suffix = pieces(chat, "user", "assistant")[-1]
    head, user_to_assistant, assistant_to_user, _ = pieces(chat, "user", "assistant", "user")
    assistant_prefix = without_start(user_to_assistant, user_suffix, "the text after a user message")
    user_prefix = without_start(assistant_to_user, assistant_suffix, "the text after an assistant message")
    lead = without_end(head, user_prefix, "the text before the first user message")
    bos = chat.tokens.get("bos_token", "")
    bos = bos if lead.startswith(bos) else ""
    forms = [RoleForm("user", user_prefix, user_suffix), RoleForm("assistant", assistant_prefix, assistant_suffix)]
    preamble, default_system = lead.removeprefix(bos), ""
    if writes(chat, "system", "user"):
        system_head, between, _ = pieces(chat, "system", "user")
        suffix = without_end(between, user_prefix, "a system message is merged into the user turn: the text between")
        if not system_head.startswith(lead):
            preamble, default_system = "", preamble
        prefix = without_start(system_head, bos + preamble, "the text before a system message")
        forms.insert(0, RoleForm("system", prefix, suffix))
    if tools and writes_results(chat):
        _, _, before, after, _ = pieces(chat, "user", "assistant", "tool", "assistant")
        prefix = without_start(before, assistant_suffix, "the text before a tool result")
        forms.append(RoleForm("tool", prefix, without_end(after, assistant_prefix, "the text after a tool result")))
    roles = {form.role for form in forms}
    definitions, calls = None, None
    if tools and writes_tools(chat):
        definitions = derive_definitions(chat, bos + preamble, user_prefix, system="system" in roles)
    if tools and writes_tool_calls(chat):
        calls = derive_calls(chat, user_suffix)
    if "tool" in roles:
        check_results(chat)
    linear = LinearTemplate(bos, preamble, default_system, tuple(forms), _generation_prompt(chat), definitions, calls)
    compare(chat, linear)
    return linear


def writes_results(chat: ChatTemplate) -> bool:
    """Whether the template has the role of a tool's results."""
    return writes(chat, "user", "assistant", "tool", "assistant")


def go_template(linear: LinearTemplate, *, add_bos: bool) -> str:
    """The Go TEMPLATE. `add_bos` is the GGUF's tokenizer.ggml.add_bos_token: when true, the server writes BOS itself.

    Every text is a Go string literal, so no brace, quote or newline of it means anything to Go. A role that the Jinja
    does not write is an error when serving (`.RoleNotInTemplate` does not exist), never a message silently lost.
    """
    if add_bos and not linear.bos:
        raise ExportError(
            "the GGUF adds BOS to every prompt (tokenizer.ggml.add_bos_token is true), the chat template does not",
            SERVING_TEMPLATE,
            "begin the template with {{- bos_token -}}, and run `dvc repro`",
        )
    lines = [_actions("" if add_bos else linear.bos, linear.preamble)]
    opening = _opening(linear)
    if opening:
        lines.append("{{- range $index, $message := .Messages }}")
        lines.append(f'{{{{- if and (eq $index 0) (ne .Role "system") }}}}{opening}{{{{ end }}}}')
    else:
        lines.append("{{- range .Messages }}")
    for number, form in enumerate(linear.roles):
        condition = "else if" if number else "if"
        lines.append(f"{{{{- {condition} eq .Role {go_literal(form.role)} }}}}{_message(linear, form)}")
    lines += ["{{- else }}{{ .RoleNotInTemplate }}", "{{- end }}", "{{- end }}" + _actions(linear.generation_prompt)]
    return "\n".join(line for line in lines if line)


def go_literal(text: str) -> str:
    """`text` as a Go string literal in printable characters, which a Modelfile keeps as they are."""
    short = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return '"' + "".join(short.get(c) or (c if c.isprintable() else _escape(c)) for c in text) + '"'


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def _actions(*texts: str) -> str:
    return "".join("{{ " + go_literal(text) + " }}" for text in texts if text)


def _opening(linear: LinearTemplate) -> str:
    """What stands before the first message of a chat that does not begin with a system message."""
    if linear.definitions is None:
        return _actions(linear.default_system)
    before, after = linear.definitions.opening
    listed = _actions(before) + _tools(linear.definitions.item) + _actions(after)
    return _if("$.Tools", listed, _actions(linear.default_system))


def _message(linear: LinearTemplate, form: RoleForm) -> str:
    plain = f"{_actions(form.prefix)}{{{{ .Content }}}}{_actions(form.suffix)}"
    if form.role == "system" and linear.definitions is not None:
        tools = _tools(linear.definitions.item)
        before, after = (
            tools.join(map(_actions, parts))
            for parts in (linear.definitions.before_system, linear.definitions.after_system)
        )
        return _if("and (eq $index 0) $.Tools", f"{before}{{{{ .Content }}}}{after}", plain)
    if form.role == "assistant" and linear.calls is not None:
        return _answer(linear.calls, form)
    return plain


def _answer(calls: CallForm, form: RoleForm) -> str:
    """An assistant's message with or without calls.

    Ollama finds calls in an answer by the first plain text that follows `if .ToolCalls`, up to a brace
    (tools/template.go): so what stands between the role's prefix and the first call is plain text, if it may be.
    """
    prefix = form.prefix if calls.prefix.startswith(form.prefix) and calls.bare.startswith(form.prefix) else ""
    beside, bare = calls.prefix.removeprefix(prefix), calls.bare.removeprefix(prefix)
    before = _if(".Content", f"{_actions(beside)}{{{{ .Content }}}}{_actions(calls.middle)}", _plain_text(bare))
    with_calls = before + _range(".ToolCalls", calls.item, CALL_SLOTS) + _actions(calls.suffix)
    without = f"{_actions(form.prefix.removeprefix(prefix))}{{{{ .Content }}}}{_actions(form.suffix)}"
    return _actions(prefix) + _if(".ToolCalls", with_calls, without)


def _plain_text(text: str) -> str:
    """The text outside of any action, where neither Go nor a Modelfile could take it for something else."""
    clear = all(character.isprintable() or character == "\n" for character in text)
    taken = any(mark in text for mark in ("{{", "}}", '"""')) or text.endswith("{")
    return text if clear and not taken else _actions(text)


def _if(condition: str, yes: str, no: str) -> str:
    return f"{{{{ if {condition} }}}}{yes}" + (f"{{{{ else }}}}{no}" if no else "") + "{{ end }}"


def _tools(item: Item) -> str:
    return _range("$.Tools", item, DEFINITION_SLOTS)


def _range(things: str, item: Item, slots: Mapping[str, str]) -> str:
    """A loop over functions or calls; inside it the dot is one of them."""
    separator = _if("$number", _actions(item.separator), "") if item.separator else ""
    body = f"{{{{ {slots[item.slots[0]]} }}}}"
    for text, slot in zip(item.between, item.slots[1:], strict=True):
        body += f"{_actions(text)}{{{{ {slots[slot]} }}}}"
    return f"{{{{ range $number, $item := {things} }}}}{separator}{body}{{{{ end }}}}"


def _generation_prompt(chat: ChatTemplate) -> str:
    messages = probe("user")
    without, full = (chat.render(messages, add_generation_prompt=asked).text for asked in (False, True))
    return without_start(full, without, "the text before the generation prompt")
