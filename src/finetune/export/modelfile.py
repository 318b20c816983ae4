"""FROM, TEMPLATE, SYSTEM and PARAMETERs <-> the text of an Ollama Modelfile, in the grammar of Ollama's parser.

The grammar has no escapes, drops unprintable characters without a word, and ends a quoted value at the first line that
ends with the closing quotes (ollama/ollama, parser/parser.go). What would not come back as it was is refused here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from finetune.errors import ExportError

BLOCK = '"""'
KEPT_WHITESPACE = " \t\r\n"
COMMANDS = frozenset(
    {"from", "license", "template", "system", "adapter", "draft", "renderer", "parser", "parameter", "message"}
    | {"requires"}
)
NUMBERS = ("num_ctx", "temperature", "top_p", "repeat_penalty")


@dataclass(frozen=True)
class Modelfile:
    """What a Modelfile of this project says. `from_path` is relative to its folder; `num_ctx` in tokens.

    `requires`: the oldest version of Ollama that it works with, or nothing.
    """

    from_path: str
    template: str
    system: str
    num_ctx: int
    temperature: float
    top_p: float
    repeat_penalty: float
    stops: tuple[str, ...]
    requires: str = ""


def render_modelfile(modelfile: Modelfile, *, context_tokens: int) -> str:
    """The Modelfile's text. `context_tokens` is the GGUF's context length, which num_ctx may not exceed.

    Raises ExportError for a value that Ollama would not read back as given.
    """
    if modelfile.num_ctx > context_tokens:
        raise ExportError(
            f"num_ctx is {modelfile.num_ctx}, the model was made for {context_tokens} tokens",
            "params.yaml: ollama_modelfile.num_ctx",
            f"set ollama_modelfile.num_ctx to {context_tokens} or less",
        )
    lines = [f"FROM {_bare(modelfile.from_path)}", f"TEMPLATE {_block('TEMPLATE', modelfile.template)}"]
    if modelfile.system:
        lines.append(f"SYSTEM {_block('SYSTEM', modelfile.system)}")
    lines += [f"PARAMETER {name} {getattr(modelfile, name)}" for name in NUMBERS]
    lines += [f"PARAMETER stop {_stop(stop)}" for stop in modelfile.stops]
    lines += [f"REQUIRES {modelfile.requires}"] if modelfile.requires else []
    return "\n".join(lines) + "\n"


def parse_modelfile(text: str) -> Modelfile:
    """The Modelfile that Ollama would read from `text`; raises ExportError where Ollama would, or for other commands.

    As in Ollama, the last FROM, TEMPLATE, SYSTEM or number wins, and stops add up.
    """
    values: dict[str, str] = {"system": ""}
    stops: list[str] = []
    for name, value in _read_commands(text):
        if name == "parameter stop":
            stops.append(value)
        elif name in ("from", "template", "system", "requires", *(f"parameter {number}" for number in NUMBERS)):
            values[name.removeprefix("parameter ")] = value
        else:
            raise _syntax(f"{name.upper()} is not written by this project", value)
    if "from" in values:
        values["from_path"] = values.pop("from")
    needed = [field.name for field in fields(Modelfile) if field.name != "stops" and field.default is MISSING]
    if missing := [name for name in needed if name not in values]:
        raise _syntax(f"no {', '.join(missing)}", text)
    try:
        return Modelfile(
            from_path=values["from_path"],
            template=values["template"],
            system=values["system"],
            num_ctx=int(values["num_ctx"]),
            temperature=float(values["temperature"]),
            top_p=float(values["top_p"]),
            repeat_penalty=float(values["repeat_penalty"]),
            stops=tuple(stops),
            requires=values.get("requires", ""),
        )
    except ValueError as fault:
        raise _syntax(f"a PARAMETER is not a number: {fault}", text) from None


def read_modelfile(path: Path) -> tuple[Modelfile, Path]:
    """A Modelfile and the GGUF that its FROM names; raises ExportError when one of the two is missing.

    Ollama takes a FROM that is no file for a model's name, and pulls that model.
    """
    if not path.is_file():
        raise ExportError("the Modelfile is missing", path, "run `dvc repro ollama_modelfile`")
    modelfile = parse_modelfile(path.read_bytes().decode())
    gguf = path.parent / modelfile.from_path
    if not gguf.is_file():
        raise ExportError(
            f"the GGUF that FROM names is missing ({gguf}); Ollama would pull a model of that name",
            path,
            "run `dvc repro ollama_modelfile`, or `dvc pull` where another machine made it",
        )
    return modelfile, gguf


def _read_commands(text: str) -> Iterator[tuple[str, str]]:
    """Command name in lower case (`parameter <name>` for PARAMETER) and value, dropping what Ollama drops."""
    rest = text.removeprefix("\ufeff")
    while rest := rest.lstrip(KEPT_WHITESPACE):
        if rest.startswith("#"):
            rest = rest[len(_line(rest)) :]
            continue
        name, rest = _word(rest)
        name = name.lower()
        if name not in COMMANDS:
            raise _syntax("unknown command", name)
        if name == "parameter":
            parameter, rest = _word(rest)
            name = f"parameter {parameter}"
        value, rest = _value(rest)
        yield name, value


def _word(text: str) -> tuple[str, str]:
    line = _line(text)
    parts = line.split(maxsplit=1)
    if len(parts) < 2:
        raise _syntax("a command without value", line)
    return parts[0], text[text.index(parts[0]) + len(parts[0]) :].lstrip(" \t")


def _value(text: str) -> tuple[str, str]:
    """The value at the start of `text`, and the text after it: whole lines, until a line's end closes the quotes."""
    taken = 0
    while taken < len(text):
        taken += len(_line(text[taken:]))
        kept = "".join(c for c in text[:taken] if c.isprintable() or c in KEPT_WHITESPACE).strip(KEPT_WHITESPACE)
        quotes = BLOCK if kept.startswith(BLOCK) else '"' if kept.startswith('"') else ""
        if not quotes:
            return kept, text[taken:]
        if len(kept) >= 2 * len(quotes) and kept.endswith(quotes):
            return kept[len(quotes) : len(kept) - len(quotes)], text[taken:]
        taken += 1
    raise _syntax("a quoted value is not closed", text)


def _line(text: str) -> str:
    ends = [at for at in (text.find("\n"), text.find("\r")) if at >= 0]
    return text[: min(ends, default=len(text))]


def _bare(path: str) -> str:
    _check_characters("FROM", path)
    if not path or path != path.strip() or path.startswith('"') or len(path.splitlines()) != 1:
        raise ExportError(f"not a path that FROM can hold: {path!r}", "Modelfile: FROM", "rename the GGUF file")
    return path


def _block(name: str, value: str) -> str:
    _check_characters(name, value)
    lines = value.replace("\r", "\n").split("\n")[:-1]
    if ended := next((line for line in lines if line.rstrip(KEPT_WHITESPACE).endswith(BLOCK)), None):
        raise ExportError(
            f'{name} has a line that ends with """, where Ollama would end the value: {ended!r}',
            f"Modelfile: {name}",
            'write the line so that it does not end with """',
        )
    return f"{BLOCK}{value}{BLOCK}"


def _stop(stop: str) -> str:
    if not stop:
        raise ExportError(
            "an empty stop string would end every answer at once",
            "params.yaml: ollama_modelfile.stop",
            "remove the empty string from ollama_modelfile.stop",
        )
    if '"' in stop or "\n" in stop or "\r" in stop:
        return _block("PARAMETER stop", stop)
    _check_characters("PARAMETER stop", stop)
    return f'"{stop}"'


def _check_characters(name: str, value: str) -> None:
    dropped = sorted({c for c in value if not c.isprintable() and c not in KEPT_WHITESPACE})
    if dropped:
        codes = ", ".join(f"U+{ord(c):04X}" for c in dropped)
        raise ExportError(
            f"{name} has characters that Ollama drops without a word ({codes}), such as a no-break space or the "
            f"joiner inside some emoji: {value!r:.200}",
            f"Modelfile: {name}",
            f"write {name} without {codes} (for SYSTEM and stop: ollama_modelfile in params.yaml)",
        )


def _syntax(what: str, seen: str) -> ExportError:
    return ExportError(
        f"not a Modelfile that this project wrote: {what}: {seen!r:.200}", "Modelfile", "run `dvc repro`"
    )
