from parsing_support import parse, source, turns

from finetune.data.rows import Fault, Parsed


def read(tmp_path, content, name="a.chatml"):
    return parse(tmp_path, name, content, source("chatml", language="fr"))


def test_a_system_line_opens_a_conversation_and_a_blank_line_before_user_opens_one_without_system(tmp_path):
    content = (
        b"<|system|>\nSois bref.\n<|user|>\nBonjour\n<|assistant|>\nSalut.\n\n"
        b"<|user|>\nEncore ?\n<|assistant|>\nOui.\n<|system|>\nS2\n<|user|>\na\n<|assistant|>\nb\n"
    )
    rows = read(tmp_path, content)
    assert [turns(row) for row in rows] == [
        [("system", "Sois bref."), ("user", "Bonjour"), ("assistant", "Salut.")],
        [("user", "Encore ?"), ("assistant", "Oui.")],
        [("system", "S2"), ("user", "a"), ("assistant", "b")],
    ]
    assert [(row.place.line, row.place.byte_offset) for row in rows] == [(1, 0), (8, 61), (12, 98)]
    assert rows[0].record.language == "fr"


def test_a_byte_order_mark_is_no_text_and_is_counted_in_the_offset(tmp_path):
    (row,) = read(tmp_path, b"\xef\xbb\xbf<|user|>\na\n<|assistant|>\nb\n")
    assert (turns(row), row.place.byte_offset) == ([("user", "a"), ("assistant", "b")], 3)


def test_without_a_blank_line_the_next_user_turn_stays_in_the_conversation(tmp_path):
    rows = read(tmp_path, b"<|user|>\na\n<|assistant|>\nb\n<|user|>\nc\n<|assistant|>\nd", "train.txt")
    assert [turns(row) for row in rows] == [[("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]]


def test_inner_blank_lines_and_indents_stay_and_only_the_end_of_a_turn_is_trimmed(tmp_path):
    rows = read(tmp_path, b"<|user|>\r\n  a\r\n\r\n b \r\n\r\n<|assistant|>\r\nc\r\n")
    assert turns(rows[0]) == [("user", "  a\n\n b "), ("assistant", "c")]


def test_openai_chatml_is_read_with_the_same_boundaries(tmp_path):
    content = (
        b"<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1\nQ2<|im_end|>\n<|im_start|>assistant\nR<|im_end|>\n\n"
        b"<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nR<|im_end|>\n"
    )
    assert [turns(row) for row in read(tmp_path, content)] == [
        [("system", "S"), ("user", "Q1\nQ2"), ("assistant", "R")],
        [("user", "Q"), ("assistant", "R")],
    ]


def test_the_first_marker_tells_the_spelling_so_a_text_may_show_the_other_one(tmp_path):
    (row,) = read(tmp_path, b"<|user|>\nExplique :\n<|im_start|>user\n<|assistant|>\nUn tour.\n")
    assert turns(row) == [("user", "Explique :\n<|im_start|>user"), ("assistant", "Un tour.")]


def test_a_conversation_with_a_bad_byte_is_quarantined_whole_and_the_others_are_kept(tmp_path):
    good = b"<|user|>\na\n<|assistant|>\nb\n\n"
    bad = b"<|user|>\nd\xe9j\xe0\n<|assistant|>\nb\n\n"
    rows = read(tmp_path, good + bad + good)
    assert [type(row) for row in rows] == [Parsed, Fault, Parsed]
    fault = rows[1]
    assert (fault.place.file, fault.place.line, fault.place.byte_offset) == ("a.chatml", 6, 28)
    assert (fault.reason, fault.detail, fault.original) == ("invalid_utf8", "byte 0xe9 at 10 of the row", bad)


def test_each_fault_has_its_reason(tmp_path):
    def reason(content):
        return [row.reason for row in read(tmp_path, content) if isinstance(row, Fault)]

    assert reason(b"<|user|>\na\n<|assistant|>\n  \n\n") == ["empty_assistant"]
    assert reason(b"<|user|>\na\n<|narrator|>\nb\n") == ["unknown_role"]
    assert reason(b"hello\n<|user|>\na\n<|assistant|>\nb\n") == ["text_before_marker"]
    assert reason(b"<|user|> a\n<|assistant|>\nb\n") == ["text_before_marker"]
    assert reason(b"<|user|>\na\n<|assistant|> b\n") == ["text_after_marker"]
    assert reason(b"<|user|>\na\0\n<|assistant|>\nb\n") == ["nul_character"]
    assert reason(b"<|im_start|>user\na\n<|im_start|>assistant\nb<|im_end|>\n") == ["unclosed_turn"]
    assert reason(b"<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb") == ["unclosed_turn"]
    assert reason(b"<|im_start|>user\na<|im_end|> x\n<|im_start|>assistant\nb<|im_end|>") == ["text_outside_turn"]


def test_a_conversation_beyond_16_mib_is_one_fault_and_the_next_one_is_read(tmp_path):
    long = b"<|user|>\n" + b"mot mot mot\n" * 1_500_000
    rows = read(tmp_path, long + b"<|assistant|>\nb\n\n<|user|>\na\n<|assistant|>\nb\n")
    assert [row.reason if isinstance(row, Fault) else turns(row) for row in rows] == [
        "conversation_too_long",
        [("user", "a"), ("assistant", "b")],
    ]
    assert rows[0].detail == "18000026 bytes, more than 16777216; the first 4096 are kept here"
    assert rows[0].original == long[:4096]
