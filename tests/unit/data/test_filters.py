import pytest
from test_repair import rules

from finetune.data.cleaning.filters import reason_to_drop
from finetune.data.cleaning.repetition import repeats
from finetune.data.record import Message, make_record

CALL = '[{"arguments": {}, "name": "f"}]'


def chat(*turns, tools=None):
    return make_record(source="s", messages=tuple(Message(*turn) for turn in turns), tools=tools)


def answer(text):
    return chat(("user", "q"), ("assistant", text))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (answer("bonne réponse"), None),
        (chat(("system", "s"), ("user", "q"), ("assistant", "", CALL), ("tool", "1"), ("assistant", "ok")), None),
        (chat(("user", "q"), ("assistant", "ok"), ("user", "encore")), None),
        (chat(("user", " \n"), ("assistant", "")), "empty"),
        (make_record(source="s", text=""), "empty"),
        (make_record(source="s", text=" \u00a0\n"), "empty"),
        (chat(("system", "s"), ("user", "q")), "no_assistant"),
        (chat(("assistant", "ok"), ("user", "q")), "roles_do_not_alternate"),
        (chat(("user", "q"), ("user", "q"), ("assistant", "ok")), "roles_do_not_alternate"),
        (chat(("user", "q"), ("assistant", "ok"), ("user", " "), ("assistant", "ok")), "empty_question"),
        (chat(("user", "q"), ("assistant", "ok"), ("tool", "1")), "roles_do_not_alternate"),
        (chat(("user", "q"), ("system", "s"), ("assistant", "ok")), "roles_do_not_alternate"),
        (answer(" . "), "answer_too_short"),
        (answer("... !?"), "answer_too_short"),
        (answer("« — »"), "answer_too_short"),
        (answer("42"), None),
        (answer("👍👍"), None),
        (answer("x" * 99), "record_too_long"),
        (answer("abcdefghij" * 9), None),
        (answer("RT @ami: bonjour"), "retweet"),
        (answer("https://t.co/abc  http://x.fr/d?e"), "link_only"),
        (answer("voir https://t.co/abc"), None),
        (answer("https://t.co/abc à voir"), None),
        (answer("Bonjour, merci de votre message."), "automatic_reply"),
        (make_record(source="s", text="RT @ami: bonjour"), "retweet"),
        (make_record(source="s", text="texte libre"), None),
        (answer("Nooo" + "o" * 20), "repeated_characters"),
        (make_record(source="s", text="ha" * 30), "repeated_characters"),
        # What the user types is not what the model learns.
        (chat(("user", "o" * 40), ("assistant", "Oui ?")), None),
    ],
)
def test_each_record_is_dropped_for_the_reason_it_deserves(record, reason):
    assert reason_to_drop(record, rules(automatic_reply_patterns=["^Bonjour,? merci de"])) == reason


def test_a_record_is_measured_with_its_calls_and_tools():
    called = chat(("user", "q"), ("assistant", "", CALL), ("tool", "1"), ("assistant", "ok"), tools="[]")
    length = len(called.all_text())
    assert length == 43
    assert reason_to_drop(called, rules(max_record_characters=length, min_record_characters=length)) is None
    assert reason_to_drop(called, rules(max_record_characters=length - 1)) == "record_too_long"
    assert reason_to_drop(called, rules(min_record_characters=length + 1)) == "record_too_short"


def test_rules_that_are_off_drop_nothing():
    off = rules(drop_retweets=False, drop_link_only=False)
    assert reason_to_drop(answer("RT @ami: bonjour"), off) is None
    assert reason_to_drop(answer("https://t.co/abc"), off) is None


@pytest.mark.parametrize(
    "text",
    [
        "a" * 21,
        "Non" + "n" * 20 + " !",
        "é" * 21,
        "ha" * 21,
        "ha " * 21,
        "abcd" * 21,
        "x =-=-" + "=-" * 21 + " y",
        "🙂" * 21,
        "un mot " + "lol" * 30 + " un mot",
        "début\n" * 3 + "!" * 21 + "\nfin",
        "- " + "123" * 21,
    ],
)
def test_a_unit_of_up_to_four_characters_may_not_be_repeated_more_often(text):
    assert repeats(text, 20)
    assert repeats("Un texte sain de plusieurs mots avant. " * 3 + text, 20)


@pytest.mark.parametrize(
    "text",
    [
        "a" * 20,
        "ha" * 20,
        "abcde" * 30,
        " " * 50,
        "a\n" * 5 + "\n" * 50,
        "texte\t" + "\t" * 40 + "texte",
        # Rules alone on a line, tables, headings, blanks to fill in, leaders.
        "Titre\n" + "=" * 40 + "\ntexte",
        "a\n\n" + "-" * 60 + "\n\nb",
        "  " + "*" * 30,
        "~" * 30,
        "=-" * 30,
        "─" * 40,
        "| a | b |\n|" + "-" * 30 + "|:" + "-" * 30 + ":|\n| 1 | 2 |",
        "| " + "---- | " * 30,
        "Nom : " + "_" * 40 + " Date : " + "_" * 30,
        "Chapitre 1 " + "." * 60 + " 12",
        # Code is not prose.
        "Voici :\n```\nx = '" + "0" * 64 + "'\n```\nFin.",
        "```python\n" + "#" * 79 + " x\n```",
    ],
)
def test_what_is_no_repetition(text):
    assert not repeats(text, 20)


def test_the_bound_may_be_small_or_large():
    assert [repeats("a" * length, 1) for length in (1, 2)] == [False, True]
    assert [repeats("ab" * times, 3) for times in (3, 4)] == [False, True]
    assert [repeats("Bien " + "abc" * times, 200) for times in (200, 201)] == [False, True]


def test_a_repetition_is_found_wherever_it_stands():
    # The search looks at some characters only: it must not depend on which.
    for before in range(40):
        for unit in ("z", "yz", "xyz", "wxyz"):
            text = "Bonjour à vous tous qui lisez ce texte sain."[:before] + " " + unit * 21 + " fin"
            assert repeats(text, 20), (before, unit)
            assert not repeats(text.replace(unit * 21, unit * 20), 20), (before, unit)
