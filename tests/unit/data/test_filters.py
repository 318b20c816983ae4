import pytest
from test_repair import rules

from finetune.data.filters import content_key, reason_to_drop
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
        (chat(("system", "s"), ("user", "q")), "no_assistant"),
        (chat(("assistant", "ok"), ("user", "q")), "roles_do_not_alternate"),
        (chat(("user", "q"), ("user", "q"), ("assistant", "ok")), "roles_do_not_alternate"),
        (chat(("user", "q"), ("assistant", "ok"), ("tool", "1")), "roles_do_not_alternate"),
        (chat(("user", "q"), ("system", "s"), ("assistant", "ok")), "roles_do_not_alternate"),
        (answer(" . "), "answer_too_short"),
        (answer("x" * 100), "record_too_long"),
        (answer("RT @ami: bonjour"), "retweet"),
        (answer("https://t.co/abc  http://x.fr/d?e"), "link_only"),
        (answer("voir https://t.co/abc"), None),
        (answer("Bonjour, merci de votre message."), "automatic_reply"),
        (make_record(source="s", text="RT @ami: bonjour"), "retweet"),
        (make_record(source="s", text="texte libre"), None),
    ],
)
def test_each_record_is_dropped_for_the_reason_it_deserves(record, reason):
    assert reason_to_drop(record, rules(automatic_reply_patterns=["^Bonjour,? merci de"])) == reason


def test_rules_that_are_off_drop_nothing():
    off = rules(drop_retweets=False, drop_link_only=False)
    assert reason_to_drop(answer("RT @ami: bonjour"), off) is None
    assert reason_to_drop(answer("https://t.co/abc"), off) is None


def test_same_content_is_told_whatever_its_case_and_white_space_but_not_its_roles_or_tools():
    key = content_key(answer("Très bien\n\tmerci"))
    assert content_key(answer("  très  BIEN merci ")) == key
    assert content_key(answer("très bien, merci")) != key
    assert content_key(chat(("user", "q"), ("assistant", "Très bien\n\tmerci"), tools="[]")) != key
    assert content_key(chat(("system", "q"), ("assistant", "Très bien\n\tmerci"))) != key
