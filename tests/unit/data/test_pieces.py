import pytest
from test_chat import chat, encoded_record

from finetune.data.encoding.encoder import make_encoder
from finetune.data.encoding.pieces import exchanges, fit
from finetune.data.record import Message, make_record
from finetune.data_sections import Tokenize
from finetune.errors import DataError

SYSTEM, QUESTION = Message("system", "a"), Message("user", "b")


def answer(text):
    return Message("assistant", text)


def fitted(record, over_length, max_tokens, loss="assistant"):
    of = chat()
    params = Tokenize(max_tokens=max_tokens, over_length=over_length, loss=loss)
    return fit(record, encoded_record(record, of, loss), of, make_encoder(of.tokenizer), params)


def rows(result):
    return [(document.input_ids.tolist(), document.trained.astype(int).tolist()) for document in result.documents]


# As ids: <s> U a U b A c </s> U b A d </s>; a is 4, b 5, c 6, d 7, A 8, U 9.
CONVERSATION = make_record(source="s", messages=(SYSTEM, QUESTION, answer("c"), QUESTION, answer("d")))


def test_truncate_cuts_at_the_bound_and_tells_what_was_lost():
    result = fitted(CONVERSATION, "truncate", 12)
    assert rows(result) == [([2, 9, 4, 9, 5, 8, 6, 3, 9, 5, 8, 7], [0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 1])]
    assert (result.cut_tokens, result.lost_trained) == (1, True)
    result = fitted(CONVERSATION, "truncate", 8)
    assert (len(result.documents[0].input_ids), result.cut_tokens, result.lost_trained) == (8, 5, True)


def test_truncate_that_takes_only_untrained_tokens_loses_no_stop_token():
    record = make_record(source="s", messages=(QUESTION, answer("c"), Message("user", "bbbb")))
    result = fitted(record, "truncate", 7)
    assert rows(result) == [([2, 9, 5, 8, 6, 3, 9], [0, 0, 0, 0, 1, 1, 0])]
    assert (result.cut_tokens, result.lost_trained) == (4, False)


def test_truncate_drops_a_record_of_which_no_trained_token_is_left():
    result = fitted(CONVERSATION, "truncate", 6)
    assert (result.documents, result.reason) == ((), "no_trained_token_left")


def test_split_cuts_between_exchanges_and_each_piece_keeps_the_system_turn():
    result = fitted(CONVERSATION, "split", 12)
    assert rows(result) == [
        ([2, 9, 4, 9, 5, 8, 6, 3], [0, 0, 0, 0, 0, 0, 1, 1]),
        ([2, 9, 4, 9, 5, 8, 7, 3], [0, 0, 0, 0, 0, 0, 1, 1]),
    ]
    assert (result.reason, result.dropped_exchanges) == (None, 0)


def test_split_keeps_the_tools_in_each_piece():
    messages = (QUESTION, answer("c"), QUESTION, answer("d"))
    result = fitted(make_record(source="s", messages=messages, tools="ab"), "split", 18)
    opening = [2, 9, 0, 0, 0, 0, 0, 0, 0, 4, 5, 9, 5, 8]  # <s> U "Tools: ab" U b A
    assert [ids for ids, _ in rows(result)] == [[*opening, 6, 3], [*opening, 7, 3]]


def test_split_fills_pieces_from_the_end_so_that_the_short_one_is_the_beginning():
    turns = [turn for letter in "abcda" for turn in (QUESTION, answer(letter))]
    result = fitted(make_record(source="s", messages=tuple(turns)), "split", 11)
    answers = [[ids[at + 1] for at, token in enumerate(ids) if token == 8] for ids, _ in rows(result)]
    assert answers == [[4], [5, 6], [7, 4]]


def test_split_drops_and_counts_an_exchange_that_is_too_long_by_itself():
    messages = (QUESTION, answer("c"), QUESTION, answer("d" * 20), QUESTION, answer("a"))
    result = fitted(make_record(source="s", messages=messages), "split", 8)
    assert [ids for ids, _ in rows(result)] == [[2, 9, 5, 8, 6, 3], [2, 9, 5, 8, 4, 3]]
    assert result.dropped_exchanges == 1
    only = fitted(make_record(source="s", messages=messages[2:4]), "split", 8)
    assert (only.documents, only.reason, only.dropped_exchanges) == ((), "over_length", 1)


def test_split_with_last_assistant_keeps_the_piece_of_the_last_answer_alone():
    result = fitted(CONVERSATION, "split", 12, "last_assistant")
    assert rows(result) == [([2, 9, 4, 9, 5, 8, 7, 3], [0, 0, 0, 0, 0, 0, 1, 1])]
    assert result.dropped_exchanges == 1


def test_split_cuts_a_plain_text_into_even_pieces_with_one_bos_each_and_eos_where_it_ends():
    result = fitted(make_record(source="s", text="abcdabc"), "split", 5)
    assert rows(result) == [([2, 4, 5, 6, 7], [1] * 5), ([2, 4, 5, 6, 3], [1] * 5)]
    assert fitted(make_record(source="s", text="abc"), "split", 1).reason == "over_length"


def test_drop_and_refuse():
    assert fitted(CONVERSATION, "drop", 12).reason == "over_length"
    assert len(fitted(CONVERSATION, "drop", 13).documents) == 1
    with pytest.raises(DataError, match=f"record {CONVERSATION.id} of source s has 13 tokens, more than 12"):
        fitted(CONVERSATION, "refuse", 12)


def test_exchanges_keep_tool_turns_and_loose_ends_with_their_answer():
    second = (QUESTION, QUESTION, answer("x"), Message("tool", "1"), answer("y"))
    messages = (SYSTEM, answer("hi"), *second, QUESTION, answer("z"), QUESTION)
    system, parts = exchanges(messages)
    assert system == (SYSTEM,)
    assert parts == [messages[1:2], second, messages[7:10]]
    assert exchanges((SYSTEM, QUESTION)) == ((SYSTEM,), [(QUESTION,)])
