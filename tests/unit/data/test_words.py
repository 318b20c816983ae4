import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.cleaning.words import fold, folded, hash_runs, hash_segments, hash_words, lines_of
from finetune.data.record import Message, make_record


def words_of(text):
    """The hashes of the words of a text, which name them."""
    return hash_words(text.encode())[0].tolist()


def test_a_word_has_the_same_hash_wherever_it_stands_and_punctuation_is_none_of_it():
    assert words_of("l'eau, l’eau – «eau»… (eau)\u00a0!") == words_of("l eau l eau eau eau")
    assert words_of("snake_case 42 été") == [*words_of("snake_case"), *words_of("42"), *words_of("été")]
    assert len(set(words_of("été ete été2 été22222222 été22222223 a aª"))) == 7
    assert words_of("?! -- …") == []
    assert words_of("") == []


def test_hashes_are_the_same_numbers_everywhere():
    assert words_of("word longer_than_eight") == [12123134668483259070, 11688969706739182798]


def test_offsets_are_those_of_the_bytes():
    assert hash_words("été, là\n«oui»".encode())[1].tolist() == [0, 7, 13]


def test_a_run_of_word_bytes_without_end_counts_as_several_words():
    assert len(words_of("a" * 200)) == 4
    assert len(set(words_of("a" * 200))) == 2


@given(st.lists(st.text("abé09_", min_size=1, max_size=20), max_size=12), st.integers(1, 6))
def test_runs_are_equal_exactly_when_their_words_are(words, size):
    hashes, _ = hash_words(" ".join(words).encode())
    runs, counts = hash_runs(hashes, np.array([len(words)]), size, whole_if_shorter=False)
    named = [tuple(words[place : place + size]) for place in range(len(words) - size + 1)]
    assert counts.tolist() == [len(named)]
    assert len(dict(zip(named, runs.tolist(), strict=True))) == len(set(runs.tolist()))


def test_runs_stay_within_their_segment_and_a_short_segment_may_be_one_run():
    hashes, _ = hash_words(b"a b c a b a b c d")
    ends = np.array([3, 5, 5, 9])
    runs, counts = hash_runs(hashes, ends, 3, whole_if_shorter=False)
    assert counts.tolist() == [1, 0, 0, 2]
    assert runs[0] == runs[1] != runs[2]
    runs, counts = hash_runs(hashes, ends, 3, whole_if_shorter=True)
    assert counts.tolist() == [1, 1, 0, 2]
    assert runs[1] == hash_runs(hash_words(b"a b")[0], np.array([2]), 2, whole_if_shorter=False)[0][0]


@given(st.lists(st.lists(st.text("ab", min_size=1, max_size=2), max_size=9), max_size=8))
def test_whole_segments_are_equal_exactly_when_their_words_are(segments):
    hashes, _ = hash_words(" ".join(" ".join(words) for words in segments).encode())
    ends = np.cumsum([len(words) for words in segments], dtype=np.int64)
    wholes = hash_segments(hashes, ends).tolist()
    named = [tuple(words) for words in segments]
    assert len(dict(zip(named, wholes, strict=True))) == len(set(named)) == len(set(wholes))


@pytest.mark.parametrize("text", ["", " \n ", "\x1e"])
def test_white_space_folds_to_nothing(text):
    assert folded(text) == ""


def test_what_was_said_stands_before_calls_and_results_and_the_system_prompt_nowhere():
    messages = (
        Message("system", "Be brief"),
        Message("user", "What  TIME\nis it?"),
        Message("assistant", "", '[{"name": "clock"}]'),
        Message("tool", "Noon"),
        Message("assistant", "It is noon."),
    )
    assert lines_of(fold(make_record(source="a", messages=messages, tools='[{"name": "clock"}]'))) == (
        b'\xffwhat time is it?\n\nit is noon.\n\xfe[{"name": "clock"}]\n\xfenoon\n'
    )
    assert lines_of(fold(make_record(source="a", text="Straße"))) == b"\xffstrasse\n"
