import pytest
from test_chat import TWO_TURNS, chat

from finetune.data.record import Message, make_record
from finetune.data.tokenizing import token_metrics, tokenize_records
from finetune.data_sections import Tokenize
from finetune.errors import DataError

SHORT = make_record(source="t", messages=(Message("user", "a"), Message("assistant", "b")))
LONG = make_record(source="t", messages=(Message("user", "a" * 40), Message("assistant", "b")))
SPELLS_EOS = make_record(source="t", messages=(Message("user", "a</s>b"), Message("assistant", "b")))


def params(max_tokens=16, over_length="drop"):
    return Tokenize(max_tokens=max_tokens, over_length=over_length, loss="assistant")


def test_each_record_is_kept_or_counted_under_its_reason():
    result = tokenize_records([TWO_TURNS, SHORT, LONG, SPELLS_EOS], chat(), params())
    assert [row["input_ids"] for row in result.rows] == [
        [2, 9, 4, 5, 8, 6, 3, 9, 7, 8, 6, 7, 3],
        [2, 9, 4, 8, 5, 3],
    ]
    assert result.rows[1]["trained"] == [False, False, False, False, True, True]
    metrics = token_metrics(result)
    assert metrics["sources"]["t"] == {
        "records_in": 3,
        "kept": 1,
        "dropped": {"over_length": 1, "special_token_in_text": 1},
        "tokens": 6,
        "trained_tokens": 2,
        "straddling_tokens": 0,
    }
    assert (metrics["records_in"], metrics["kept"], metrics["longest_tokens"]) == (4, 2, 13)
    assert dict(result.lengths) == {("s", 32): 1, ("t", 32): 1, ("t", 64): 1}


def test_over_length_refuse_names_the_record():
    with pytest.raises(DataError, match=f"record {LONG.id} of source t has 45 tokens, more than 16"):
        tokenize_records([SHORT, LONG], chat(), params(over_length="refuse"))


@pytest.mark.parametrize("records", [[], [LONG]])
def test_nothing_left_is_an_error(records):
    with pytest.raises(DataError, match="nothing is left to train on"):
        tokenize_records(records, chat(), params())


def test_a_record_without_a_trained_token_is_dropped_and_counted():
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{% endgeneration %}"
        "{% endif %}{% endfor %}{{ eos_token }}"
    )
    with pytest.raises(DataError, match="2 turns are trained and 0 of them end"):
        tokenize_records([TWO_TURNS], chat(template), params())
    empty = make_record(source="u", text="")
    result = tokenize_records([SHORT, empty], chat(), params())
    assert result.counts["u"].dropped == {}
