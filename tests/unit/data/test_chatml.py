from finetune.data.chatml import parse_chatml
from finetune.data.rows import Fault, Origin, Parsed

ORIGIN = Origin("chat", "chat/a.chatml", "fr")


def turns(row):
    assert isinstance(row, Parsed), row
    return [(message.role, message.content) for message in row.record.messages]


def test_a_system_line_opens_a_conversation_and_a_blank_line_before_user_opens_one_without_system():
    content = (
        b"<|system|>\nSois bref.\n<|user|>\nBonjour\n<|assistant|>\nSalut.\n\n"
        b"<|user|>\nEncore ?\n<|assistant|>\nOui.\n<|system|>\nS2\n<|user|>\na\n<|assistant|>\nb\n"
    )
    rows = list(parse_chatml(content, ORIGIN))
    assert [turns(row) for row in rows] == [
        [("system", "Sois bref."), ("user", "Bonjour"), ("assistant", "Salut.")],
        [("user", "Encore ?"), ("assistant", "Oui.")],
        [("system", "S2"), ("user", "a"), ("assistant", "b")],
    ]
    assert [(row.place.line, row.place.byte_offset) for row in rows] == [(1, 0), (8, 61), (12, 98)]


def test_without_a_blank_line_the_next_user_turn_stays_in_the_conversation():
    rows = list(parse_chatml(b"<|user|>\na\n<|assistant|>\nb\n<|user|>\nc\n<|assistant|>\nd", ORIGIN))
    assert [turns(row) for row in rows] == [[("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]]


def test_inner_blank_lines_and_indents_stay_and_only_the_end_of_a_turn_is_trimmed():
    rows = list(parse_chatml(b"<|user|>\r\n  a\r\n\r\n b \r\n\r\n<|assistant|>\r\nc\r\n", ORIGIN))
    assert turns(rows[0]) == [("user", "  a\n\n b "), ("assistant", "c")]


def test_openai_chatml_is_read_with_the_same_boundaries():
    content = (
        b"<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1\nQ2<|im_end|>\n<|im_start|>assistant\nR<|im_end|>\n\n"
        b"<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nR<|im_end|>\n"
    )
    assert [turns(row) for row in parse_chatml(content, ORIGIN)] == [
        [("system", "S"), ("user", "Q1\nQ2"), ("assistant", "R")],
        [("user", "Q"), ("assistant", "R")],
    ]


def test_a_conversation_with_a_bad_byte_is_quarantined_whole_and_the_others_are_kept():
    good = b"<|user|>\na\n<|assistant|>\nb\n\n"
    bad = b"<|user|>\nd\xe9j\xe0\n<|assistant|>\nb\n\n"
    rows = list(parse_chatml(good + bad + good, ORIGIN))
    assert [type(row) for row in rows] == [Parsed, Fault, Parsed]
    fault = rows[1]
    assert (fault.place.file, fault.place.line, fault.place.byte_offset) == ("chat/a.chatml", 6, 28)
    assert (fault.reason, fault.detail, fault.original) == ("invalid_utf8", "byte 0xe9 at 10 of the row", bad)


def test_each_fault_has_its_reason():
    def reason(content):
        return [row.reason for row in parse_chatml(content, ORIGIN) if isinstance(row, Fault)]

    assert reason(b"<|user|>\na\n<|assistant|>\n  \n\n") == ["empty_assistant"]
    assert reason(b"<|user|>\na\n<|narrator|>\nb\n") == ["unknown_role"]
    assert reason(b"hello\n<|user|>\na\n<|assistant|>\nb\n") == ["text_before_marker"]
    assert reason(b"<|user|> a\n<|assistant|>\nb\n") == ["text_before_marker"]
    assert reason(b"<|user|>\na\n<|assistant|> b\n") == ["text_after_marker"]
    assert reason(b"<|im_start|>user\na\n<|im_start|>assistant\nb<|im_end|>\n") == ["unclosed_turn"]
    assert reason(b"<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb") == ["unclosed_turn"]
    assert reason(b"<|im_start|>user\na<|im_end|> x\n<|im_start|>assistant\nb<|im_end|>") == ["text_outside_turn"]
