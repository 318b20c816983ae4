import json
import unicodedata

import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.normalizers import NFC, Lowercase
from tokenizers.pre_tokenizers import ByteLevel, Metaspace, Sequence, Split
from tokenizers.trainers import BpeTrainer

from finetune.chat_template import Rendered
from finetune.data.encoding.chat import encode
from finetune.data.encoding.encoder import GPT2_PATTERN, PATTERNS, encode_text, make_encoder, without_fast_path
from finetune.errors import DataError
from finetune.pretokenizer import LLAMA3_PATTERN

SPECIAL = ["<s>", "</s>", "<|user|>"]
TEXTS = ["L'été, on n'a vu que 12 345 « déjà-vu » ; it's here, isn't it?\n\n", "aaab abab aab bbba  \t\r\n"] * 8
# Letters, digits, white space and quotes of many kinds, whose words and classes are easy to get wrong.
HOSTILE = "abAB'’sSſtTlLéÉ 09²٣½!?<>/|\t\r\n\x0b\x1c\x85\xa0\u2003\u200b\u3000"
HOSTILE += "e\u0301🧠👩🏽日本ß\u0345\U00011380\U000e0001"
EVERY_CHARACTER = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)


def word_splitter(pattern):
    if pattern == GPT2_PATTERN:
        return ByteLevel(add_prefix_space=False, use_regex=True)
    return Sequence([Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])


def trained(pattern=LLAMA3_PATTERN, **changes):
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = word_splitter(pattern)
    trainer = BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def of_merges(*merges, more=(), ignore_merges=False):
    pairs = [tuple(merge.split()) for merge in merges]
    tokens = dict.fromkeys([*sorted(ByteLevel.alphabet()), *("".join(pair) for pair in pairs), *more])
    tokenizer = Tokenizer(BPE({token: at for at, token in enumerate(tokens)}, pairs, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = word_splitter(LLAMA3_PATTERN)
    return tokenizer


def with_model(**changes):
    state = json.loads(trained().to_str())
    state["model"].update(changes)
    return Tokenizer.from_str(json.dumps(state))


ENCODERS = [make_encoder(trained(pattern)) for pattern in PATTERNS] + [make_encoder(trained(normalizer=NFC()))]


@given(st.lists(st.one_of(st.text(HOSTILE), st.sampled_from([*SPECIAL, "</s", "it's", "  \n"]), st.text())))
@example(["aaab", "<s>", "\u1161\u11a8", "가\u11a8"])
@settings(max_examples=300, deadline=None)
def test_both_paths_give_the_same_ids_and_the_same_mask(parts):
    text = "".join(parts)
    spans = tuple((start, len(text) - start // 2) for start in {len(text) // 3})
    for encoder in ENCODERS:
        assert encoder.refusal is None
        results = [encode(Rendered(text, spans), each, "assistant") for each in (encoder, without_fast_path(encoder))]
        fast, slow = [(each.input_ids.tolist(), each.trained.tolist(), each.straddling) for each in results]
        assert fast == slow


@pytest.mark.parametrize("kind", [r"\p{L}", r"\p{N}", r"\s", "(?i:d|e|l|m|r|s|t|v)"])
def test_the_classes_of_the_patterns_are_the_same_in_both_engines_over_every_character(kind):
    bytes_only = tiktoken.Encoding(
        "bytes", pat_str=kind, mergeable_ranks={bytes([byte]): byte for byte in range(256)}, special_tokens={}
    )
    ours = set(bytes(bytes_only.encode(EVERY_CHARACTER)).decode())
    others = "".join(piece for piece, _ in Split(Regex(kind), "removed").pre_tokenize_str(EVERY_CHARACTER))
    assert ours == set(EVERY_CHARACTER) - set(others)


def test_nfc_of_each_character_is_that_of_python():
    apart = "\n".join(EVERY_CHARACTER)
    assert NFC().normalize_str(apart) == unicodedata.normalize("NFC", apart)


def test_a_text_that_nfc_changes_goes_the_slow_way():
    encoder = make_encoder(trained(normalizer=NFC()))
    assert encode_text(encoder, "été").in_bytes
    assert not encode_text(encoder, "e\u0301té").in_bytes
    # Not assigned in Unicode 15, which Python 3.12 has: a later Unicode might compose it.
    assert not encode_text(encoder, "a\U00011380").in_bytes


def test_white_space_that_tiktoken_gives_up_on_goes_the_slow_way():
    tokens = encode_text(ENCODERS[1], " " * 1_100_000 + "a")
    assert (tokens.in_bytes, tokens.ends[-1]) == (False, 1_100_001)


def test_places_are_in_bytes_and_added_tokens_count_their_own():
    tokens = encode_text(ENCODERS[1], "<s>é</s>")
    assert (tokens.ids[0], tokens.ids[-1]) == (0, 1)
    assert (tokens.starts[0], tokens.ends[0], tokens.starts[-1], tokens.ends[-1]) == (0, 3, 5, 9)
    assert encode_text(ENCODERS[1], "").ids.tolist() == []


def test_truncation_and_padding_of_the_file_are_switched_off():
    tokenizer = trained(normalizer=Lowercase())
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    assert encode_text(make_encoder(tokenizer), "zzzz").ids.tolist() == [tokenizer.token_to_id("z")] * 4


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (trained(normalizer=Lowercase()), "its normalizer Lowercase may change the text"),
        (trained(pre_tokenizer=Metaspace()), "not a known byte-level one: Metaspace"),
        (trained(pre_tokenizer=ByteLevel(add_prefix_space=True)), "not a known byte-level one: ByteLevel"),
        (trained(pattern=r"\w+"), r"split by a pattern that was not compared: \\w\+"),
        (trained(encode_special_tokens=True), "set to read special tokens as text"),
        (of_merges("a b", "ab c", "b c", "a bc"), "the merges of one of its tokens are apart"),
        (of_merges("a b", "b c", "a bc"), "its token 'abc' is not what its own merges make"),
        (of_merges("a b", more=["abc"], ignore_merges=True), "two of its tokens join to 'abc', and no merge says so"),
        (with_model(dropout=0.1), "not a plain BPE: BPE, .0.1, None, None."),
        (Tokenizer(WordLevel({"a": 0}, "a")), "not a known byte-level one: none"),
    ],
)
def test_a_tokenizer_for_which_equality_is_not_shown_goes_the_slow_way(tokenizer, reason):
    with pytest.raises(AssertionError, match=reason):
        assert make_encoder(tokenizer).refusal is None, make_encoder(tokenizer).refusal


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        (AddedToken("<mask>", lstrip=True), "added token '<mask>' trims"),
        (AddedToken("<s>x"), "'<s>' and '<s>x' can overlap"),
        (AddedToken("s><"), "can overlap"),
        (AddedToken("e\u0301"), "is not NFC"),
    ],
)
def test_added_tokens_that_trim_or_overlap_go_the_slow_way(token, reason):
    tokenizer = trained()
    tokenizer.add_tokens([token])
    assert reason in make_encoder(tokenizer).refusal


def test_an_unlisted_pair_that_tiktoken_would_join_is_not_joined():
    # "ab" before "bc": of "abc" the list makes ab + c, and knows no way on.
    encoder = make_encoder(of_merges("a b", "b c", "a bc"))
    assert [encoder.tokenizer.id_to_token(token) for token in encode_text(encoder, "abc").ids] == ["ab", "c"]


def test_words_that_no_merge_makes_are_taken_whole_where_the_tokenizer_does_so():
    encoder = make_encoder(of_merges("a b", more=["xyz"], ignore_merges=True))
    assert encoder.refusal is None
    for text in ("xyz", "xyzab", "ab", "abxyz"):
        assert encode_text(encoder, text).ids.tolist() == encoder.tokenizer.encode(text).ids


def test_bytes_that_get_lost_are_an_error():
    encoder = ENCODERS[1]
    encoder.fast.sizes[encoder.fast.encoding.encode("z")[0]] += 1
    try:
        with pytest.raises(DataError, match=r"the ids of a text of 1 bytes stand for \[2\] bytes"):
            encode_text(encoder, "z")
    finally:
        encoder.fast.sizes[encoder.fast.encoding.encode("z")[0]] -= 1
