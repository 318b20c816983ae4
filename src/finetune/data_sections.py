"""The sections of params.yaml for the data stages: fetch, clean, tokenizer, tokenize, split.

No section has a default: what a run does is what params.yaml says.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from finetune.sections import Name, Positive, RepoId, Revision, Section, Share


class LocalOrigin(Section):
    """Files below `fetch.local_dir`, by glob."""

    kind: Literal["local"]
    files: Annotated[str, Field(min_length=1)]


class HubOrigin(Section):
    """Files of a Hub dataset at one commit, by glob."""

    kind: Literal["hub"]
    repo_id: RepoId
    revision: Revision
    files: Annotated[str, Field(min_length=1)]


class Columns(Section):
    """Which column of a table holds what; null where the table has none. `text` excludes `user` and `assistant`."""

    text: str | None
    system: str | None
    user: str | None
    assistant: str | None
    group: str | None

    @model_validator(mode="after")
    def _one_shape(self) -> Self:
        chat = self.user is not None and self.assistant is not None
        if (self.text is not None) == chat:
            raise ValueError(f"name either `text` or both `user` and `assistant`, got {self.model_dump()}")
        return self


class ChatSource(Section):
    """A source whose files are conversations."""

    name: Name
    format: Literal["chatml", "messages", "sharegpt"]
    origin: Annotated[LocalOrigin | HubOrigin, Field(discriminator="kind")]
    license: str
    language: Literal["fr", "en"] | None


class CsvSource(Section):
    """A table. With `columns.text` and a `prompt`, each row answers that prompt; with `prompt: null` it is plain text.

    `group_characters`: how many leading characters of the group column name the group (10 of an ISO date: the day).
    """

    name: Name
    format: Literal["csv"]
    origin: Annotated[LocalOrigin | HubOrigin, Field(discriminator="kind")]
    license: str
    language: Literal["fr", "en"] | None
    columns: Columns
    prompt: str | None
    group_characters: Positive | None


Source = Annotated[ChatSource | CsvSource, Field(discriminator="format")]


class ScratchBase(Section):
    """A small Llama made and pre-trained by the `base` stage."""

    kind: Literal["scratch"]


class HubBase(Section):
    """A causal language model of the Hub at one commit."""

    kind: Literal["hub"]
    repo_id: RepoId
    revision: Revision


class Fetch(Section):
    """What to read. `local_dir`: the folder that local sources are found in."""

    local_dir: str
    base_model: Annotated[ScratchBase | HubBase, Field(discriminator="kind")]
    sources: Annotated[list[Source], Field(min_length=1)]

    @model_validator(mode="after")
    def _unique_names(self) -> Self:
        names = [source.name for source in self.sources]
        if doubles := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"source names must differ, repeated: {', '.join(doubles)}")
        return self


class Clean(Section):
    """What a kept record looks like. Lengths in characters; patterns are regular expressions on the answer."""

    normalization: Literal["NFC", "NFKC"]
    repair_mojibake: bool
    unescape_html: bool
    min_answer_characters: Positive
    max_record_characters: Positive
    drop_retweets: bool
    drop_link_only: bool
    automatic_reply_patterns: list[str]
    max_quarantined_share: Share

    @model_validator(mode="after")
    def _patterns_compile(self) -> Self:
        for pattern in self.automatic_reply_patterns:
            try:
                re.compile(pattern)
            except re.error as fault:
                raise ValueError(
                    f"automatic_reply_patterns: {pattern!r} is not a regular expression: {fault}"
                ) from None
        return self


class KeepTokenizer(Section):
    """The base model's own tokenizer, with the recipe's chat template (the base's own one, with generation marks)."""

    strategy: Literal["keep"]
    chat_template: str


class TrainTokenizer(Section):
    """A byte-level BPE trained on the training share of the clean text. Role markers become single tokens."""

    strategy: Literal["train"]
    chat_template: str
    vocab_size: Annotated[int, Field(ge=300, le=200_000)]
    min_frequency: Positive
    bos_token: str
    eos_token: str
    pad_token: str
    role_markers: Annotated[list[str], Field(min_length=1)]

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        tokens = [self.bos_token, self.eos_token, self.pad_token, *self.role_markers]
        if len(set(tokens)) < len(tokens):
            raise ValueError(f"bos, eos, pad and role markers must all differ, got {tokens}")
        return self


class Tokenize(Section):
    """Records to ids. `loss`: which tokens are trained; `over_length`: what happens past `max_tokens`."""

    max_tokens: Positive
    over_length: Literal["drop", "refuse"]
    loss: Literal["assistant", "last_assistant", "all"]


HeldOutShare = Annotated[float, Field(gt=0, lt=1)]


class Split(Section):
    """Shares by hash of the group, per source; `pack_tokens`: length of a packed row."""

    validation_share: HeldOutShare
    test_share: HeldOutShare
    mini_train_rows: Positive
    pack_tokens: Positive

    @model_validator(mode="after")
    def _leaves_training(self) -> Self:
        if self.validation_share + self.test_share >= 1:
            raise ValueError(
                f"validation_share ({self.validation_share}) + test_share ({self.test_share}) must be below 1"
            )
        return self
