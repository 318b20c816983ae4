"""A Jinja chat template -> the Go TEMPLATE of a Modelfile that writes the same prompts, or a refusal with the reason.

The Jinja is probed, not parsed: it renders chats of recognisable contents, and what stands around each content is
that role's prefix and suffix. The result is a linear form (one prefix and one suffix per role, wherever the message
stands), which is then compared with the Jinja on many chats: a template that is not linear is refused with the chat
that shows it. Ollama's own rules, which no TEMPLATE can change: neighbours of one role are merged into one message
(tool results excepted), so chats with such neighbours are not compared, and BOS is added by the GGUF's metadata.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jinja2

from finetune.chat_template import SERVING_TEMPLATE, ChatTemplate, Turn
from finetune.errors import ExportError

REMEDY = (
    "change the recipe's chat template to one fixed prefix and suffix per role, "
    "such as recipes/smoke/chat_template.jinja, and run `dvc repro`"
)
EXCERPT_CHARACTERS = 60
PLAIN = {"system": "Be brief.", "user": "Hello", "assistant": "Good day", "tool": "21 degrees"}


@dataclass(frozen=True)
class RoleForm:
    """What a message of `role` is written as: prefix, content, suffix."""

    role: str
    prefix: str
    suffix: str


@dataclass(frozen=True)
class LinearTemplate:
    """A chat as BOS, preamble, one RoleForm per message, generation prompt.

    `bos` is empty when the Jinja writes none; `default_system` is the text in place of a missing first system message;
    `roles` are the roles that the Jinja writes.
    """

    bos: str
    preamble: str
    default_system: str
    roles: tuple[RoleForm, ...]
    generation_prompt: str

    def render(self, messages: Sequence[Turn]) -> str:
        """The prompt's text, generation prompt included."""
        forms = {form.role: form for form in self.roles}
        parts = [self.bos, self.preamble]
        if messages[0]["role"] != "system":
            parts.append(self.default_system)
        for message in messages:
            form = forms[message["role"]]
            parts += [form.prefix, message["content"], form.suffix]
        return "".join([*parts, self.generation_prompt])

    def role_names(self) -> list[str]:
        """The roles that the template writes."""
        return [form.role for form in self.roles]


def derive_template(chat: ChatTemplate) -> LinearTemplate:
    """The linear form of a chat template; raises ExportError naming what is not linear, with an example."""
    user_suffix = _pieces(chat, "user")[-1]
    assistant_suffix = _pieces(chat, "user", "assistant")[-1]
    head, user_to_assistant, assistant_to_user, _ = _pieces(chat, "user", "assistant", "user")
    assistant_prefix = _without_start(user_to_assistant, user_suffix, "the text after a user message")
    user_prefix = _without_start(assistant_to_user, assistant_suffix, "the text after an assistant message")
    lead = _without_end(head, user_prefix, "the text before the first user message")
    bos = chat.tokens.get("bos_token", "")
    bos = bos if lead.startswith(bos) else ""
    forms = [RoleForm("user", user_prefix, user_suffix), RoleForm("assistant", assistant_prefix, assistant_suffix)]
    preamble, default_system = lead.removeprefix(bos), ""
    if _writes(chat, "system", "user"):
        system_head, between, _ = _pieces(chat, "system", "user")
        suffix = _without_end(between, user_prefix, "a system message is merged into the user turn: the text between")
        if not system_head.startswith(lead):
            preamble, default_system = "", preamble
        prefix = _without_start(system_head, bos + preamble, "the text before a system message")
        forms.insert(0, RoleForm("system", prefix, suffix))
    if _writes(chat, "user", "assistant", "tool", "assistant"):
        _, _, before, after, _ = _pieces(chat, "user", "assistant", "tool", "assistant")
        prefix = _without_start(before, assistant_suffix, "the text before a tool result")
        forms.append(RoleForm("tool", prefix, _without_end(after, assistant_prefix, "the text after a tool result")))
    linear = LinearTemplate(bos, preamble, default_system, tuple(forms), _generation_prompt(chat))
    _compare(chat, linear)
    return linear


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
    if linear.default_system:
        lines.append("{{- range $index, $message := .Messages }}")
        lines.append(
            f'{{{{- if and (eq $index 0) (ne .Role "system") }}}}{_actions(linear.default_system)}{{{{ end }}}}'
        )
    else:
        lines.append("{{- range .Messages }}")
    for number, form in enumerate(linear.roles):
        condition = "else if" if number else "if"
        body = f"{_actions(form.prefix)}{{{{ .Content }}}}{_actions(form.suffix)}"
        lines.append(f"{{{{- {condition} eq .Role {go_literal(form.role)} }}}}{body}")
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


def _pieces(chat: ChatTemplate, *roles: str) -> list[str]:
    """The texts around the contents of a chat with these roles, without generation prompt: one more than roles."""
    contents = [f"zq{role}{number}qz" for number, role in enumerate(roles)]
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    try:
        rest = chat.render(messages, add_generation_prompt=False).text
    except jinja2.TemplateError as fault:
        raise _refusal(f"it refuses a chat of {', '.join(roles)}: {fault}", messages) from None
    pieces = []
    for role, content in zip(roles, contents, strict=True):
        before, found, rest = rest.partition(content)
        if not found:
            raise _refusal(f"the content of the {role} message is dropped, moved or altered", messages)
        pieces.append(before)
    for role, content in zip(roles, contents, strict=True):
        if content in rest or any(content in piece for piece in pieces):
            raise _refusal(f"the content of the {role} message is written more than once", messages)
    return [*pieces, rest]


def _writes(chat: ChatTemplate, *roles: str) -> bool:
    """Whether the template accepts a chat with these roles and writes all its contents somewhere."""
    messages = [{"role": role, "content": f"zq{role}qz"} for role in roles]
    try:
        text = chat.render(messages, add_generation_prompt=False).text
    except jinja2.TemplateError:
        return False
    return all(message["content"] in text for message in messages)


def _generation_prompt(chat: ChatTemplate) -> str:
    messages = [{"role": "user", "content": "zquser0qz"}]
    without, full = (chat.render(messages, add_generation_prompt=asked).text for asked in (False, True))
    return _without_start(full, without, "the text before the generation prompt")


def _without_start(text: str, start: str, what: str) -> str:
    if not text.startswith(start):
        raise _refusal(f"{what} depends on what follows: {_short(text)} does not begin with {_short(start)}")
    return text[len(start) :]


def _without_end(text: str, end: str, what: str) -> str:
    if not text.endswith(end):
        raise _refusal(f"{what} depends on what stands before: {_short(text)} does not end with {_short(end)}")
    return text[: len(text) - len(end)]


def _compare(chat: ChatTemplate, linear: LinearTemplate) -> None:
    for meaning, messages in _comparisons(linear.role_names()):
        try:
            truth = chat.render(messages, add_generation_prompt=True).text
        except jinja2.TemplateError:
            continue  # The Jinja forbids this order of roles; nothing was trained on it.
        form = linear.render(messages)
        if truth != form:
            at = next(
                (i for i, (a, b) in enumerate(zip(truth, form, strict=False)) if a != b), min(len(truth), len(form))
            )
            start = max(0, at - EXCERPT_CHARACTERS // 2)
            shown = (
                f"the Jinja writes {_short(truth[start:])}, one prefix and suffix per role gives {_short(form[start:])}"
            )
            raise _refusal(f"{meaning}: {shown}", messages)


def _comparisons(roles: Sequence[str]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Chats, each with the construct that it would reveal."""

    def chat(names: str, **contents: str) -> list[dict[str, str]]:
        return [{"role": name, "content": contents.get(name, PLAIN[name])} for name in names.split()]

    shapes = ["user", "user assistant user", "user assistant " * 4 + "user"]
    if "system" in roles:
        shapes += [f"system {shape}" for shape in shapes]
    for shape in shapes:
        yield "the text around a message depends on its place", chat(shape)
    longest = shapes[-1] + (" assistant tool assistant user" if "tool" in roles else "")
    yield "the text around a message depends on its place", chat(longest)
    for role in roles:
        yield f"the content of a {role} message is trimmed", chat(longest, **{role: f" \n\t{PLAIN[role]} \n"})
        yield f"an empty {role} message is treated apart", chat(longest, **{role: ""})
        yield f"a blank {role} message is treated apart", chat(longest, **{role: "   "})
        yield f"the content of a {role} message is escaped", chat(longest, **{role: "<b>\"1\" & '2'</b> \\n {{ x }} é"})
    think = "<think>\nwhy\n</think>\n\nGood day"
    yield "<think> text of earlier answers is removed", chat("user assistant user", assistant=think)
    for shape in ("user assistant", "assistant user", "user assistant user assistant"):
        yield "the generation prompt or a prefix depends on the first or last role", chat(shape)
    if "system" in roles:
        yield "a chat of a system message alone is treated apart", chat("system")
        yield "a later system message is moved, dropped or written otherwise", chat("user assistant system user")
        yield "an answer right after the system message is treated apart", chat("system assistant user")
    if "tool" in roles:
        yield "a tool result is treated apart when it comes last", chat("user assistant tool")
        yield "neighbouring tool results are grouped", chat("user assistant tool tool assistant user")


def _short(text: str) -> str:
    return repr(text if len(text) <= EXCERPT_CHARACTERS else text[:EXCERPT_CHARACTERS] + "…")


def _refusal(reason: str, messages: Sequence[Turn] = ()) -> ExportError:
    roles = ", ".join(message["role"] for message in messages)
    where = f"{SERVING_TEMPLATE}, for a chat of {roles}" if roles else SERVING_TEMPLATE
    return ExportError(f"the chat template cannot be written as an Ollama TEMPLATE: {reason}", where, REMEDY)
