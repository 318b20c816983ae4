"""Counted words -> a byte-level BPE tokenizer of the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

from finetune.data.vocabulary.bpe_training import Vocabulary, learn
from finetune.data.vocabulary.word_counts import WordCounts, WordTable, count_words
from finetune.data_sections import TrainTokenizer
from finetune.log import progress_bar
from finetune.pretokenizer import LLAMA3_PATTERN, byte_characters


def special_tokens(params: TrainTokenizer) -> list[str]:
    """The special tokens in the order of their ids, 0, 1, 2, ...: pad, bos, eos, unk, role markers, others."""
    unknown = [] if params.unk_token is None else [params.unk_token]
    first = [params.pad_token, params.bos_token, params.eos_token, *unknown]
    return [*first, *params.role_markers, *params.special_tokens]


def train(texts: Iterable[str], params: TrainTokenizer) -> Tokenizer:
    """Train on texts that fit in memory, in this process."""
    table = WordTable(params.max_words)
    table.add(count_words(texts))
    return train_on_words(table.finish(), params)


def train_on_words(words: WordCounts, params: TrainTokenizer) -> Tokenizer:
    """The tokenizer that BpeTrainer of the `tokenizers` library trains on a text with these words.

    No post-processor: the chat template writes BOS, and nothing may write a second one. Every byte has a token, so the
    unknown token, where there is one, is never written.
    """
    first = special_tokens(params)
    with progress_bar(params.vocab_size, len(first) + len(byte_characters()), "token", "train BPE") as bar:
        vocabulary = learn(words, first, params.vocab_size, params.min_frequency, bar.update)
    return _assembled(vocabulary, first)


def _assembled(vocabulary: Vocabulary, first: list[str]) -> Tokenizer:
    tokens = vocabulary.tokens
    merges = [(tokens[left], tokens[right]) for left, right in vocabulary.merges]
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, merges, ignore_merges=False))
    tokenizer.pre_tokenizer = Sequence(
        [Split(Regex(LLAMA3_PATTERN), behavior="isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(first)
    return tokenizer
