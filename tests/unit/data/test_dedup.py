from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.cleaning.dedup import content_key, duplicates
from finetune.data.cleaning.words import fold
from finetune.data.record import Message, make_record


def of_text(text):
    return content_key(fold(make_record(source="a", text=text)))


def of_chat(*turns, **more):
    return content_key(fold(make_record(source="a", messages=tuple(Message(*turn) for turn in turns), **more)))


def test_case_and_white_space_make_no_difference_and_all_else_does():
    assert of_text("Un  TEXTE\n") == of_text("un texte")
    assert of_text("un texte.") != of_text("un texte")
    turns = (("user", "a"), ("assistant", "b"))
    assert of_chat(*turns) == of_chat(("user", " A"), ("assistant", "B "), group="other")
    others = [
        of_chat(("user", "a b")),
        of_chat(("user", "a"), ("tool", "b")),
        of_chat(("user", "a"), ("assistant", "", "b")),
        of_chat(*turns, tools="[]"),
        of_chat(("user", "a"), ("assistant", "b"), ("user", "c")),
        of_text("a b"),
    ]
    assert len({of_chat(*turns), *others}) == 7


def test_source_group_and_language_are_no_content():
    record = make_record(source="a", text="x", language="fr")
    assert fold(record) == fold(replace(record, source="b", group="g", language=None))


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=30))
def test_the_first_of_equal_keys_stays(pairs):
    gone, kept = duplicates(np.array(pairs, dtype=np.uint64).reshape(-1, 2))
    first = {}
    expected = [(rank, first[pair]) for rank, pair in enumerate(pairs) if first.setdefault(pair, rank) != rank]
    assert list(zip(gone.tolist(), kept.tolist(), strict=True)) == expected
