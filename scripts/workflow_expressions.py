"""`${{ ... }}` of a workflow and its contexts -> values, as GitHub evaluates them; what is not known here is an error.

Written from GitHub's reference of expressions and contexts. A subset on purpose: a name or a function that nobody uses
here raises ExpressionError instead of giving the empty string that GitHub gives.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

Value: TypeAlias = str | float | bool | None
Contexts: TypeAlias = Mapping[str, object]
TOKEN = re.compile(
    r"\s*(?:(?P<string>'(?:[^']|'')*')|(?P<number>-?\d+(?:\.\d+)?)|(?P<name>[A-Za-z_][\w.-]*)"
    r"|(?P<operator>==|!=|&&|\|\||[!(),]))"
)
PLACEHOLDER = re.compile(r"\$\{\{(.*?)\}\}", re.DOTALL)
STATUS = ("always", "success", "failure", "cancelled")


class ExpressionError(Exception):
    """An expression that this evaluator does not know; the text names it."""


class Expression:
    """One expression's tokens, read from left to right."""

    def __init__(self, text: str, contexts: Contexts, folder: Path) -> None:
        self.text, self.contexts, self.folder = text, contexts, folder
        self.tokens = list(tokens(text))
        self.at = 0

    def value(self) -> Value:
        """The value of the whole expression."""
        found = self.either()
        if self.at != len(self.tokens):
            raise ExpressionError(f"{self.tokens[self.at][1]!r} is not expected here in: {self.text}")
        return found

    def take(self, *wanted: str) -> str | None:
        """The next token if it is an operator of these."""
        if self.at < len(self.tokens) and self.tokens[self.at][0] == "operator" and self.tokens[self.at][1] in wanted:
            self.at += 1
            return self.tokens[self.at - 1][1]
        return None

    def either(self) -> Value:
        """`a || b`: the first that counts as true, else the last."""
        left = self.both()
        while self.take("||"):
            right = self.both()
            left = left if truth(left) else right
        return left

    def both(self) -> Value:
        """`a && b`: the first that counts as false, else the last."""
        left = self.comparison()
        while self.take("&&"):
            right = self.comparison()
            left = right if truth(left) else left
        return left

    def comparison(self) -> Value:
        """`a == b` and `a != b`, of strings without regard to case."""
        left = self.negation()
        while operator := self.take("==", "!="):
            right = self.negation()
            same = fold(left) == fold(right)
            left = same if operator == "==" else not same
        return left

    def negation(self) -> Value:
        """`!a`."""
        return not truth(self.negation()) if self.take("!") else self.atom()

    def atom(self) -> Value:
        """A literal, a name, a call, or brackets."""
        if self.take("("):
            inner = self.either()
            self.expect(")")
            return inner
        if self.at == len(self.tokens):
            raise ExpressionError(f"ends too early: {self.text}")
        kind, text = self.tokens[self.at]
        self.at += 1
        if kind == "string":
            return text[1:-1].replace("''", "'")
        if kind == "number":
            return float(text)
        if kind == "operator":
            raise ExpressionError(f"{text!r} is not expected here in: {self.text}")
        if text in ("true", "false", "null"):
            return {"true": True, "false": False, "null": None}[text]
        return self.call(text) if self.take("(") else lookup(text, self.contexts)

    def call(self, name: str) -> Value:
        """A function of GitHub's that is known here."""
        given: list[Value] = []
        while not self.take(")"):
            given.append(self.either())
            if not self.take(","):
                self.expect(")")
                break
        if name in STATUS:
            return bool(lookup(f"status.{name}", self.contexts))
        known: dict[str, Callable[[list[str]], Value]] = {
            "hashFiles": lambda patterns: hash_files(self.folder, patterns),
            "contains": lambda pair: pair[1].lower() in pair[0].lower(),
            "startsWith": lambda pair: pair[0].lower().startswith(pair[1].lower()),
            "format": lambda parts: parts[0].format(*parts[1:]),
        }
        if name not in known:
            raise ExpressionError(f"function {name} is not known here, in: {self.text}")
        return known[name]([shown(argument) for argument in given])

    def expect(self, operator: str) -> None:
        """Read one operator, which must be there."""
        if not self.take(operator):
            raise ExpressionError(f"{operator!r} is missing in: {self.text}")


def tokens(text: str) -> list[tuple[str, str]]:
    """Kind and text of each token."""
    found, at, text = [], 0, text.rstrip()
    while at < len(text):
        match = TOKEN.match(text, at)
        if match is None or match.lastgroup is None:
            raise ExpressionError(f"cannot read {text[at:]!r} in: {text}")
        found.append((match.lastgroup, match[match.lastgroup]))
        at = match.end()
    return found


def lookup(name: str, contexts: Contexts) -> Value:
    """The value of `context.key.key`; raises ExpressionError where there is none."""
    here: object = contexts
    for part in name.split("."):
        if not isinstance(here, Mapping) or part not in here:
            raise ExpressionError(f"{name} is not known here")
        here = here[part]
    if isinstance(here, str | float | int | None):
        return here
    raise ExpressionError(f"{name} is no single value")


def fold(value: Value) -> Value:
    """A value as `==` compares it."""
    return value.lower() if isinstance(value, str) else value


def truth(value: Value) -> bool:
    """Whether a value counts as true: false, 0, the empty string and null do not."""
    return bool(value)


def shown(value: Value) -> str:
    """A value as it is put into a text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def hash_files(folder: Path, patterns: list[str]) -> str:
    """SHA-256 over the SHA-256 of each file that matches; empty if none does."""
    named = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    total = hashlib.sha256()
    for file in named:
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest() if named else ""


def evaluate(text: str, contexts: Contexts, folder: Path) -> Value:
    """The value of one expression without its braces.

    Args:
        text: Such as `matrix.python == '3.12'`.
        contexts: Name of a context -> its keys; `status` holds always, success, failure and cancelled.
        folder: Where hashFiles looks.

    Raises:
        ExpressionError: The expression uses what is not known here.
    """
    return Expression(text, contexts, folder).value()


def filled(text: str, contexts: Contexts, folder: Path) -> str:
    """A text with each `${{ ... }}` replaced by its value; raises as `evaluate`."""
    return PLACEHOLDER.sub(lambda found: shown(evaluate(found[1], contexts, folder)), text)


def condition(text: str, contexts: Contexts, folder: Path) -> bool:
    """Whether an `if:` holds: one that names no function of the status asks for success too, as on GitHub."""
    inner = PLACEHOLDER.fullmatch(text.strip())
    bare = inner[1] if inner else text
    if not any(re.search(rf"\b{name}\s*\(", bare) for name in STATUS):
        bare = f"success() && ({bare})"
    return truth(evaluate(bare, contexts, folder))
