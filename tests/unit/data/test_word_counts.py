import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from finetune.data.vocabulary.word_counts import WordTable, count_words, everyday_words
from finetune.pretokenizer import LLAMA3_PATTERN

LIBRARY = Split(Regex(LLAMA3_PATTERN), behavior="isolated")
EVERYDAY = [*range(0x250), *range(0x2000, 0x2070), *range(0x20A0, 0x20C0)]


def counted(texts):
    table = WordTable(max_words=10_000)
    table.add(count_words(texts))
    return {word.decode(): count for word, count in table.counts.items()}


def by_library(texts):
    counts = {}
    for text in texts:
        for word, _ in LIBRARY.pre_tokenize_str(text):
            counts[word] = counts.get(word, 0) + 1
    return counts


def test_words_keep_their_space_and_are_counted_over_all_texts():
    texts = ["le vélo, le  vélo", "l'été\n  le vélo.\nFin", " le 12345"]
    assert counted(texts) == {
        " vélo": 3,
        " le": 3,
        ",": 1,
        ".\n": 1,
        "Fin": 1,
        " ": 3,
        "123": 1,
        "45": 1,
        "le": 1,
        "l": 1,
        "'été": 1,
        "\n": 1,
    }


@settings(max_examples=400, deadline=None)
@given(st.lists(st.text(st.sampled_from(list("aZé19.,'’s\n\r\t \u00a0\u2028\x1c€中😀ſ")), max_size=40), max_size=4))
def test_the_words_are_those_of_the_library_whatever_the_white_space(texts):
    assert counted(texts) == by_library(texts)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=30))
def test_the_words_are_those_of_the_library_in_every_script(text):
    assert counted([text]) == by_library([text])


def test_both_engines_take_every_everyday_character_for_the_same():
    for code in EVERYDAY:
        text = "a{0}1 {0}b' {0}{0}\n.{0}\n'{0} '{0}e 1{0}{0}1".format(chr(code))
        assert everyday_words(text) == [word for word, _ in LIBRARY.pre_tokenize_str(text)]


def test_no_text_has_no_words():
    assert counted([]) == counted([""]) == {}


def test_of_a_full_table_the_rarest_and_latest_words_are_forgotten_and_counted():
    table = WordTable(max_words=4)
    table.add(count_words(["ab ab ab cd cd ef gh"]))
    assert table.counts == {b" ab": 2, b" cd": 2, b" ef": 1}
    words = table.finish()
    assert [bytes(words.data[a:b]) for a, b in zip(words.offsets, words.offsets[1:], strict=False)] == [
        b" ab",
        b" cd",
        b" ef",
    ]
    assert words.counts.tolist() == [2, 2, 1]
    assert (words.forgotten_words, words.forgotten_occurrences) == (2, 2)
    assert int(words.counts.sum()) + words.forgotten_occurrences == 7


def test_a_table_that_is_not_full_forgets_nothing_and_is_emptied():
    table = WordTable(max_words=5)
    for _ in range(3):
        table.add(count_words(["ab ab ab cd cd ef gh"]))
    words = table.finish()
    assert (words.counts.sum(), words.forgotten_words, words.forgotten_occurrences) == (21, 0, 0)
    assert table.counts == {}


@pytest.mark.parametrize("max_words", [10, 100])
def test_frequent_words_survive_a_stream_of_rare_ones(max_words):
    table = WordTable(max_words)
    for block in range(50):
        table.add(count_words([" le vélo " + " ".join(f"rare{chr(97 + block % 26)}{chr(97 + n)}" for n in range(20))]))
    assert (table.counts[b" le"], table.counts[b" v\xc3\xa9lo"]) == (50, 50)
    assert len(table.counts) <= max_words
