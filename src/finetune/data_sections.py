"""The sections of params.yaml for the data stages: fetch, clean, tokenizer, tokenize, split.

No section has a default: what a run does is what params.yaml says.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from finetune.mix_sections import HeldOutShare, Mix, shares_sum_to_one
from finetune.sections import Name, Positive, RepoId, Revision, Section, Share
from finetune.source_sections import Source


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
    def _named_once_and_one_to_train_on(self) -> Self:
        names = [source.name for source in self.sources]
        if doubles := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"source names must differ, repeated: {', '.join(doubles)}")
        if not any(source.use == "training" for source in self.sources):
            raise ValueError("no source has `use: training`, so there is nothing to train on")
        return self

    def names(self, use: str) -> list[str]:
        """The sources of one use, in order."""
        return [source.name for source in self.sources if source.use == use]


class Languages(Section):
    """Records in another language are dropped. Texts below `min_characters`, or judged less surely, are kept."""

    allowed: Annotated[list[Literal["fr", "en"]], Field(min_length=1)]
    min_characters: Positive
    min_confidence: Share


class NearDuplicates(Section):
    """MinHash candidates, verified: a record that shares `min_jaccard` of its word shingles with a kept one goes."""

    min_jaccard: Annotated[float, Field(gt=0, lt=1)]
    shingle_words: Positive
    permutations: Annotated[int, Field(ge=16, le=1024, multiple_of=16)]


class Decontamination(Section):
    """Training records that share a run of `ngram_words` words with a held-out or evaluation record are dropped.

    So are those that have a whole question of an evaluation set, however short; what many records say is template.
    """

    ngram_words: Annotated[int, Field(ge=4)]


PersonalData = Literal["email", "phone", "iban", "payment_card", "ip_address"]


class Clean(Section):
    """What a kept record looks like. Lengths in characters; patterns are regular expressions on the answer.

    The stage fails when more than `max_quarantined_share` of all rows cannot be read, or more than half of one source's
    (more than `max_quarantined_share`, where that is above one half).
    """

    normalization: Literal["NFC", "NFKC"]
    repair_mojibake: bool
    unescape_html: bool
    min_answer_characters: Positive
    min_record_characters: Positive
    max_record_characters: Positive
    max_repeated_characters: Positive
    languages: Languages | None
    drop_retweets: bool
    drop_link_only: bool
    drop_personal_data: list[PersonalData]
    automatic_reply_patterns: list[str]
    near_duplicates: NearDuplicates | None
    decontamination: Decontamination | None
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


class NewToken(Section):
    """A token for the base's vocabulary: `reserved` renames an unused token of the base, `add` adds a row.

    `text` leaves the string as plain text, which costs several tokens each time; `reserved` is null but for `reserved`.
    """

    text: Annotated[str, Field(min_length=1)]
    place: Literal["reserved", "add", "text"]
    reserved: str | None

    @model_validator(mode="after")
    def _names_what_it_takes(self) -> Self:
        if (self.place == "reserved") != (self.reserved is not None):
            raise ValueError(
                f"`reserved` names the base's token exactly when `place` is reserved, got {self.model_dump()}"
            )
        return self


class ExtendTokenizer(Section):
    """The base model's tokenizer with further tokens, whose embedding rows are trained and saved with the adapter."""

    strategy: Literal["extend"]
    chat_template: str
    tokens: Annotated[list[NewToken], Field(min_length=1)]

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        texts = [token.text for token in self.tokens]
        taken = [token.reserved for token in self.tokens if token.reserved is not None]
        if len(set(texts)) < len(texts) or len(set(taken)) < len(taken):
            raise ValueError(f"tokens and the reserved ones they take must all differ, got {texts} and {taken}")
        return self


class TrainTokenizer(Section):
    """A byte-level BPE. Role markers and further special tokens become single tokens.

    `corpus`: share in bytes of each source that it is trained on, or null for the training share of the clean text.
    `max_words`: how many different words are counted at a time; beyond it the rarest are forgotten, and that is
    reported. About 200 bytes of memory each.
    """

    strategy: Literal["train"]
    chat_template: str
    vocab_size: Annotated[int, Field(ge=300, le=200_000)]
    min_frequency: Positive
    max_words: Annotated[int, Field(ge=10_000)]
    corpus: dict[Name, HeldOutShare | Literal[1]] | None
    bos_token: str
    eos_token: str
    pad_token: str
    unk_token: str | None
    role_markers: Annotated[list[str], Field(min_length=1)]
    special_tokens: list[str]

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        tokens = [self.bos_token, self.eos_token, self.pad_token, *self.role_markers, *self.special_tokens]
        tokens += [] if self.unk_token is None else [self.unk_token]
        if len(set(tokens)) < len(tokens):
            raise ValueError(f"bos, eos, pad, unk, role markers and special tokens must all differ, got {tokens}")
        if self.corpus is not None:
            shares_sum_to_one("corpus", self.corpus)
        return self


class Tokenize(Section):
    """Records to ids. `loss`: which tokens are trained; `over_length`: what happens past `max_tokens`.

    `drop` counts the record out; `truncate` cuts it and drops it where no trained token is left; `split` makes
    several documents of it, between turns; `refuse` ends the stage.
    """

    max_tokens: Positive
    over_length: Literal["drop", "truncate", "split", "refuse"]
    loss: Literal["assistant", "last_assistant", "all"]


class Split(Section):
    """Shares by hash of the group, per source; `pack_tokens`: of a packed row; `mix`: null takes each row once."""

    validation_share: HeldOutShare
    test_share: HeldOutShare
    mini_train_rows: Positive
    pack_tokens: Positive
    mix: Mix | None

    @model_validator(mode="after")
    def _leaves_training(self) -> Self:
        if self.validation_share + self.test_share >= 1:
            raise ValueError(
                f"validation_share ({self.validation_share}) + test_share ({self.test_share}) must be below 1"
            )
        return self
