"""A source in params.yaml: where its files are, which format they have, which rows and columns are taken."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from finetune.sections import Name, Positive, RepoId, Revision, Section

Format = Literal[
    "chatml",
    "messages",
    "sharegpt",
    "alpaca",
    "prompt_completion",
    "transcript",
    "message_tree",
    "tool_query",
    "glaive",
    "signatures",
    "turns",
    "text",
]
# What each format reads, by the name that `columns` may map to another one of the file.
FIELDS: dict[str, tuple[str, ...]] = {
    "chatml": (),
    "messages": ("messages", "role", "content", "tool_calls", "tools", "system", "group"),
    "sharegpt": ("conversations", "from", "value", "system", "tools", "group"),
    "alpaca": ("instruction", "input", "output", "system", "group"),
    "prompt_completion": ("prompt", "completion", "system", "group"),
    "transcript": ("transcript", "group"),
    "message_tree": ("message_id", "parent_id", "tree", "role", "text", "language", "rank"),
    "tool_query": ("query", "tools", "answers", "group"),
    "glaive": ("system", "chat", "group"),
    "signatures": ("functions", "query", "call", "group"),
    "turns": ("turns", "system", "group"),
    "text": ("text", "group"),
}


class LocalOrigin(Section):
    """Files below `fetch.local_dir`, by glob."""

    kind: Literal["local"]
    files: Annotated[str, Field(min_length=1)]


class HubOrigin(Section):
    """Files of a Hub dataset at one commit, by glob, whole."""

    kind: Literal["hub"]
    repo_id: RepoId
    revision: Revision
    files: Annotated[str, Field(min_length=1)]


class HubStreamOrigin(Section):
    """The first rows of the files of a Hub dataset, read as they arrive, up to a budget; for sets too large to keep.

    `max_bytes`: of the rows as JSON lines. One of the two budgets may be null.
    """

    kind: Literal["hub_stream"]
    repo_id: RepoId
    revision: Revision
    files: Annotated[str, Field(min_length=1)]
    max_rows: Positive | None
    max_bytes: Positive | None

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.max_rows is None and self.max_bytes is None:
            raise ValueError("give max_rows or max_bytes: without a budget, `kind: hub` downloads the files whole")
        return self


class Filter(Section):
    """Rows whose column holds none of the values are dropped, and counted as `filtered_<column>`."""

    column: Annotated[str, Field(min_length=1)]
    any_of: Annotated[list[str | int | bool | None], Field(min_length=1)]


class Source(Section):
    """Files, their format, and which rows and columns of them are taken.

    `use`: `training`; `tokenizer` (text to train a tokenizer and a scratch base on, never the adapter); or
    `decontamination` (an evaluation set, which training records must not repeat).
    `columns`: field of the format -> column of the file, where they differ; a field that is named here must be there.
    `group_characters`: how many leading characters of the group name it (10 of an ISO date: the day).
    `prompt`: for `text`, what each text answers, or null for plain text. `paths`: for `message_tree`, the best-ranked
    path of each tree or all of them.
    """

    name: Name
    format: Format
    use: Literal["training", "tokenizer", "decontamination"]
    origin: Annotated[LocalOrigin | HubOrigin | HubStreamOrigin, Field(discriminator="kind")]
    license: str
    language: Literal["fr", "en"] | None
    columns: dict[str, str]
    filters: list[Filter]
    group_characters: Positive | None
    prompt: str | None
    paths: Literal["best", "all"] | None

    @model_validator(mode="after")
    def _fits_its_format(self) -> Self:
        fields = FIELDS[self.format]
        if unknown := sorted(set(self.columns) - set(fields)):
            known = ", ".join(fields) or "none"
            raise ValueError(f"columns: {', '.join(unknown)} is no field of {self.format}, which has: {known}")
        if self.prompt is not None and self.format != "text":
            raise ValueError(f"prompt is for format text, and must be null for {self.format}")
        if (self.paths is not None) != (self.format == "message_tree"):
            raise ValueError(f"paths must be best or all for message_tree, and null otherwise; here {self.paths}")
        if self.format == "chatml" and (self.filters or self.group_characters is not None):
            raise ValueError("a chatml file has no columns: filters must be [] and group_characters null")
        return self

    def column(self, field: str) -> str:
        """The column of the file that holds a field of the format."""
        return self.columns.get(field, field)
