"""The sections of params.yaml, dvc.yaml and metrics/*.json -> what each page of docs/stages must say about a stage."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pipeline_files import ROOT, stages
from pydantic import BaseModel

from finetune.params import Params

FOLDER = ROOT / "docs/stages"
COMMON = ("recipe", "seed", "cpu_threads")
NOUNS = {int: "whole number", float: "number", str: "text", bool: "`true` or `false`"}
# What has a shape of its own is called by what it is.
NAMED = {r"^[a-z][a-z0-9_]*$": "name", r"^[\w.-]+/[\w.-]+$": "`owner/name`"}

WORDING: dict[str, Callable[[Any, str], str]] = {
    "ge": lambda bound, _: f"{bound:,} or more",
    "gt": lambda bound, _: f"above {bound:,}",
    "le": lambda bound, _: f"at most {bound:,}",
    "lt": lambda bound, _: f"below {bound:,}",
    "multiple_of": lambda bound, _: f"a multiple of {bound}",
    "min_length": lambda bound, unit: "not empty" if bound == 1 else f"at least {bound} {unit}",
    "max_length": lambda bound, unit: f"at most {bound} {unit}",
    # As code in a table, where a bar must not end the cell.
    "pattern": lambda pattern, _: f"`{pattern}`".replace("|", "\\|"),
}


def page(stage: str) -> str:
    """The text of a stage's page."""
    return (FOLDER / f"{stage}.md").read_text(encoding="utf-8")


def between(text: str, name: str) -> list[list[str]]:
    """The cells of the table between the comments <!-- name --> and <!-- /name -->, its head left out."""
    table = text.split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0]
    # A bar inside a cell is written as \|.
    rows = [re.split(r"(?<!\\) \| ", line.strip().strip("|").strip()) for line in table.splitlines()[2:]]
    return [[cell.strip() for cell in row] for row in rows]


def parameters(stage: str) -> dict[str, str]:
    """Key -> what its value may be, for every key of a stage's section, in order."""
    alias = "registration" if stage == "register" else stage
    if alias not in Params.model_fields:
        return {}
    field = Params.model_fields[alias]
    return dict(keys(field.annotation, ""))


def common_parameters() -> dict[str, str]:
    """The keys of params.yaml that are no section."""
    return {name: value(Params.model_fields[name].annotation, Params.model_fields[name].metadata) for name in COMMON}


def keys(form: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """The keys below a type, sections within sections by dots, and those of list entries behind `[]`."""
    found: dict[str, list[tuple[str, str]]] = {}
    sections = sections_in(form)
    for section in sections:
        for name, field in section.model_fields.items():
            inner = sections_in(field.annotation)
            key = f"{prefix}{name}"
            shown = nullable("block" if not is_list(field.annotation) else "list of blocks", field.annotation)
            said = shown if inner else value(field.annotation, field.metadata)
            found.setdefault(key, []).append((kind_of(section), said))
            if inner:
                below = f"{key}{'[]' if is_list(field.annotation) else ''}."
                for deeper, text in keys(field.annotation, below):
                    found.setdefault(deeper, []).append((kind_of(section), text))
    for key, entries in found.items():
        texts = list(dict.fromkeys(text for _, text in entries))
        if key.endswith((".kind", "strategy")) and all(text.startswith("`") for text in texts) and len(sections) > 1:
            yield key, f"one of {', '.join(texts)}"
        elif len(entries) == len(sections) or len(sections) == 1:
            yield key, "; or ".join(texts)
        else:
            yield key, f"{'; or '.join(texts)} (with {', '.join(f'`{kind}`' for kind, _ in entries)})"


def kind_of(section: type[BaseModel]) -> str:
    """The value of the key that tells one kind of section from another."""
    for name in ("kind", "strategy"):
        if name in section.model_fields and get_origin(section.model_fields[name].annotation) is Literal:
            return str(get_args(section.model_fields[name].annotation)[0])
    return section.__name__


def sections_in(form: Any) -> list[type[BaseModel]]:
    """The sections that a type is, or is a list or one of."""
    if isinstance(form, type) and issubclass(form, BaseModel):
        return [form]
    if get_origin(form) in (Annotated, list, Union, types.UnionType):
        parts = get_args(form)[:1] if get_origin(form) is Annotated else get_args(form)
        return [section for part in parts for section in sections_in(part)]
    return []


def is_list(form: Any) -> bool:
    """Whether a type is a list, or one that may be null."""
    bare = get_args(form)[0] if get_origin(form) is Annotated else form
    return get_origin(bare) is list


def nullable(text: str, form: Any) -> str:
    """The text, and that null is allowed where it is."""
    return f"{text}, or `null`" if type(None) in get_args(form) else text


def value(form: Any, metadata: Sequence[Any] = ()) -> str:
    """What a value may be, in words: its kind, its bounds, its choices."""
    patterns = [pattern for entry in flat(metadata) if (pattern := getattr(entry, "pattern", None))]
    if patterns and patterns[0] in NAMED:
        return NAMED[patterns[0]]
    origin, parts = get_origin(form), get_args(form)
    if origin is Annotated:
        return value(parts[0], flat(parts[1:]))
    if origin in (Union, types.UnionType):
        return ", or ".join(value(part, metadata) if part is not type(None) else "`null`" for part in parts)
    if origin is Literal:
        choices = [f"`{json.dumps(part) if not isinstance(part, str) else part}`" for part in parts]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if origin is list:
        return f"list: {value(parts[0])}{bounds(metadata, 'of them')}"
    if origin is dict:
        return f"{value(parts[0])} to {value(parts[1])}{bounds(metadata, 'of them')}"
    if any(type(each).__name__ == "AfterValidator" for each in metadata):
        return "commit, 40 hex digits"
    return f"{NOUNS[form]}{bounds(metadata, 'characters' if form is str else '')}"


def flat(metadata: Sequence[Any]) -> list[Any]:
    """The constraints of an Annotated type: those inside a Field, and those that stand by themselves."""
    return [part for entry in metadata for part in (getattr(entry, "metadata", None) or [entry])]


def bounds(metadata: Sequence[Any], unit: str) -> str:
    """`, 1 or more`, `, above 0 and below 1`, `, at most 80 characters`."""
    given: dict[str, Any] = {}
    for entry in metadata:
        given |= {name: found for name in WORDING if (found := getattr(entry, name, None)) is not None}
    return "".join(f", {write(given[name], unit)}" for name, write in WORDING.items() if name in given)


def reads_and_writes(stage: str) -> tuple[list[str], list[str]]:
    """The files of dvc.yaml that a stage reads, its code and pins left out, and those that it writes."""
    entry = stages()[stage]
    read = [dep for dep in entry["deps"] if not dep.startswith(("src/", "requirements/"))]
    written = [
        out if isinstance(out, str) else next(iter(out))
        for kind in ("outs", "metrics", "plots")
        for out in entry.get(kind, [])
    ]
    # ${fetch.local_dir} is the value of that key.
    return [re.sub(r"\$\{(.*)\}", r"\1", path) for path in read], written


def others_read(stage: str) -> list[str]:
    """The keys of params.yaml beside the stage's own section whose change runs it again."""
    return [name for name in stages()[stage].get("params", []) if name != stage]


def metric_keys(content: Any, prefix: str = "") -> Iterator[str]:
    """The keys of a metrics file, nested ones by dots; entries of a list of objects count as one, of none as `-`."""
    if isinstance(content, list) and content and isinstance(content[0], dict):
        for entry in content:
            yield from metric_keys(entry, f"{prefix}[]")
    elif isinstance(content, dict):
        for name, inner in (content or {"-": None}).items():
            yield from metric_keys(inner, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix


def covers(pattern: str, key: str) -> bool:
    """Whether a row's key, with words in <angle brackets> for any name, means this key and all below it."""
    parts = [r"[^.\[]+" if part.startswith("<") else re.escape(part) for part in re.split(r"(<[^>]+>)", pattern)]
    return re.fullmatch("".join(parts), key) is not None
