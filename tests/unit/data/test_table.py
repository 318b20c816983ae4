import pytest

from finetune.data.formats import parse_file
from finetune.data.record import Message
from finetune.data.rows import Fault
from finetune.data_sections import Columns, CsvSource, LocalOrigin
from finetune.errors import DataError


def source(prompt="Style", *, group_characters=10, **columns):
    named = {"text": "texte", "system": None, "user": None, "assistant": None, "group": "date", **columns}
    return CsvSource(
        name="tweets",
        format="csv",
        origin=LocalOrigin(kind="local", files="t.csv"),
        license="MIT",
        language="fr",
        columns=Columns(**named),
        prompt=prompt,
        group_characters=group_characters,
    )


HEADER = b"id,texte,date\n"


def read(content, table):
    return list(parse_file(content, "tweets/t.csv", table))


def test_each_row_answers_the_prompt_and_the_day_is_its_group():
    (row,) = read(b'\xef\xbb\xbfid,texte,date\n1,"Un ""bon"" jour\nsur, deux lignes",2024-05-06T07:08\n', source())
    assert row.record.messages == (Message("user", "Style"), Message("assistant", 'Un "bon" jour\nsur, deux lignes'))
    assert row.record.group == "tweets/2024-05-06"
    assert (row.place.line, row.place.byte_offset) == (2, 17)


def test_without_a_prompt_a_row_is_plain_text():
    (row,) = read(HEADER + b"1,Bonjour,2024-05-06\n", source(None, group_characters=None))
    assert (row.record.text, row.record.messages, row.record.group) == ("Bonjour", (), "tweets/2024-05-06")


def test_question_and_answer_columns_make_a_conversation():
    table = source(None, text=None, system="s", user="q", assistant="a", group=None)
    rows = read(b"s,q,a\nS,Q,A\n,Q,A\n", table)
    assert [row.record.messages for row in rows] == [
        (Message("system", "S"), Message("user", "Q"), Message("assistant", "A")),
        (Message("user", "Q"), Message("assistant", "A")),
    ]


def test_bad_rows_are_quarantined_one_by_one_and_reading_resumes_on_the_next_line():
    content = (
        HEADER
        + b"1,d\xe9j\xe0,2024-01-01\n"
        + b"2\n"
        + b"3,a,b,c\n"
        + b'4,"jamais ferm\xc3\xa9,2024-01-01\n'
        + b"5,,2024-01-01\n"
        + b"\n"
        + b"6,bon,2024-01-01\n"
    )
    rows = read(content, source())
    faults = [(row.place.line, row.reason, row.original) for row in rows if isinstance(row, Fault)]
    assert faults == [
        (2, "invalid_utf8", b"1,d\xe9j\xe0,2024-01-01\n"),
        (3, "missing_column", b"2\n"),
        (4, "too_many_cells", b"3,a,b,c\n"),
        (5, "broken_csv", b'4,"jamais ferm\xc3\xa9,2024-01-01\n'),
        (6, "empty_assistant", b"5,,2024-01-01\n"),
    ]
    assert rows[-1].record.messages[1].content == "bon"
    assert len(rows) == 6


def test_a_header_without_a_named_column_is_one_error_that_names_file_column_and_header():
    with pytest.raises(DataError, match=r"column\(s\) texte not in the header, which has: id, text, date") as caught:
        read(b"id,text,date\n1,a,b\n", source())
    assert "tweets/t.csv" in str(caught.value)
    assert "fetch.sources.columns" in caught.value.remedy


def test_a_quote_that_swallows_many_rows_counts_each_of_their_lines():
    swallowed = [
        b'1,"jamais ferm\xc3\xa9,2024-01-01\n',
        *(b"%d,x,2024-01-01\n" % n for n in range(2, 21)),
        b'",21,2024\n',
    ]
    rows = read(HEADER + b"".join(swallowed) + b"22,bon,2024-01-01\n", source())
    assert [(row.place.line, row.reason, row.original) for row in rows[:-1]] == [
        (number, "open_quote", line) for number, line in enumerate(swallowed, 2)
    ]
    assert rows[0].detail == "21 lines from line 2 on would be one row: close the quote that opens there"
    assert (rows[-1].place.line, rows[-1].record.messages[1].content) == (23, "bon")


def test_a_cell_of_twenty_lines_is_a_cell():
    (row,) = read(HEADER + b'1,"' + b"vers\n" * 19 + b'fin",2024-01-01\n', source())
    assert row.record.messages[1].content == "vers\n" * 19 + "fin"


def test_a_named_column_that_stands_twice_in_the_header_is_an_error():
    with pytest.raises(DataError, match=r"column\(s\) texte more than once in the header: texte, date, texte"):
        read(b"texte,date,texte\na,2024,b\n", source())
    (row,) = read(b"texte,x,x,date\na,1,2,2024\n", source())
    assert row.record.messages[1].content == "a"


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_an_error_that_names_it(content):
    with pytest.raises(DataError, match=r"file is empty\n  where:  tweets/t\.csv"):
        read(content, source())
