import pytest
from parsing_support import outcome, parse, source, turns

from finetune.data.reading import lines
from finetune.data.reading.formats import Chunk, check_file, chunks, parse_chunk
from finetune.data.record import Message
from finetune.data.rows import Fault
from finetune.errors import DataError

HEADER = b"id,texte,date\n"
TWEETS = source("text", language="fr", prompt="Style", group_characters=10, columns={"text": "texte", "group": "date"})


def read(tmp_path, content, described=TWEETS, file="t.csv"):
    return parse(tmp_path, file, content, described)


def check(tmp_path, content, described=TWEETS, file="t.csv"):
    (tmp_path / file).write_bytes(content)
    check_file(tmp_path, file, described)


def test_each_row_answers_the_prompt_and_the_day_is_its_group(tmp_path):
    content = b'\xef\xbb\xbfid,texte,date\n1,"Un ""bon"" jour\nsur, deux lignes",2024-05-06T07:08\n'
    (row,) = read(tmp_path, content)
    assert row.record.messages == (Message("user", "Style"), Message("assistant", 'Un "bon" jour\nsur, deux lignes'))
    assert row.record.group == "s/2024-05-06"
    assert (row.place.line, row.place.byte_offset) == (2, 17)


def test_without_a_prompt_a_row_is_plain_text_and_a_tsv_has_tabs(tmp_path):
    plain = source("text", columns={"text": "texte", "group": "date"})
    (row,) = read(tmp_path, b"id\ttexte\tdate\n1\tBonjour, toi\t2024-05-06\n", plain, "t.tsv")
    assert (row.record.text, row.record.messages, row.record.group) == ("Bonjour, toi", (), "s/2024-05-06")


def test_a_cell_that_must_be_a_list_holds_json(tmp_path):
    content = (
        b'conversations\n"[{""from"": ""human"", ""value"": ""q""}, {""from"": ""gpt"", ""value"": ""r""}]"\n"[1"\n'
    )
    rows = read(tmp_path, content, source("sharegpt"))
    assert turns(rows[0]) == [("user", "q"), ("assistant", "r")]
    assert outcome(rows[1]) == "broken_json"


def test_question_and_answer_columns_make_a_conversation(tmp_path):
    described = source("prompt_completion", columns={"system": "s", "prompt": "q", "completion": "a"})
    rows = read(tmp_path, b"s,q,a\nS,Q,A\n,Q,A\n", described)
    assert [turns(row) for row in rows] == [
        [("system", "S"), ("user", "Q"), ("assistant", "A")],
        [("user", "Q"), ("assistant", "A")],
    ]


def test_bad_rows_are_quarantined_one_by_one_and_reading_resumes_on_the_next_line(tmp_path):
    content = (
        HEADER
        + b"1,d\xe9j\xe0,2024-01-01\n"
        + b"2\n"
        + b"3,a,b,c\n"
        + b'4,"jamais ferm\xc3\xa9,2024-01-01\n'
        + b"5,,2024-01-01\n"
        + b"\n"
        + b"6,a\0b,2024-01-01\n"
        + b"7,bon,2024-01-01\n"
    )
    rows = read(tmp_path, content)
    faults = [(row.place.line, row.reason, row.original) for row in rows if isinstance(row, Fault)]
    assert faults == [
        (2, "invalid_utf8", b"1,d\xe9j\xe0,2024-01-01\n"),
        (3, "missing_field", b"2\n"),
        (4, "too_many_cells", b"3,a,b,c\n"),
        (5, "broken_csv", b'4,"jamais ferm\xc3\xa9,2024-01-01\n'),
        (6, "empty_assistant", b"5,,2024-01-01\n"),
        (8, "nul_character", b"6,a\0b,2024-01-01\n"),
    ]
    assert rows[-1].record.messages[1].content == "bon"
    assert len(rows) == 7


def test_a_header_without_a_named_column_is_one_error_that_names_file_column_and_header(tmp_path):
    with pytest.raises(DataError, match=r"column\(s\) date, texte not in the header, which has: id, text") as caught:
        check(tmp_path, b"id,text\n1,a\n")
    assert "t.csv" in str(caught.value)
    assert "`columns` and `filters`" in caught.value.remedy


def test_a_quote_that_swallows_many_rows_counts_each_of_their_lines(tmp_path):
    swallowed = [
        b'1,"jamais ferm\xc3\xa9,2024-01-01\n',
        *(b"%d,x,2024-01-01\n" % n for n in range(2, 21)),
        b'",21,2024\n',
    ]
    rows = read(tmp_path, HEADER + b"".join(swallowed) + b"22,bon,2024-01-01\n")
    assert [(row.place.line, row.reason, row.original) for row in rows[:-1]] == [
        (number, "open_quote", line) for number, line in enumerate(swallowed, 2)
    ]
    assert rows[0].detail == "21 lines from line 2 on would be one row: close the quote that opens there"
    assert (rows[-1].place.line, rows[-1].record.messages[1].content) == (23, "bon")


@pytest.mark.parametrize("two_columns", [False, True])
def test_a_stray_quote_that_swallows_rows_is_told_by_their_numbers_and_dates(tmp_path, two_columns):
    swallowed = [b'1,"ouvert,2020-01-01\n', b"2,deux,2020-01-02\n", b"3,trois,2020-01-03\n", b'4,24",2020-01-04\n']
    described, header = TWEETS, HEADER
    if two_columns:
        swallowed = [b'100000001,"ouvert\n', b"100000002,deux\n", b'100000003,24"\n']
        described, header = source("text", columns={"text": "texte"}), b"id,texte\n"
    rows = read(
        tmp_path, header + b"".join(swallowed) + b"5,cinq,2020-01-05\n"[: -12 if two_columns else None], described
    )
    assert [(row.place.line, row.reason, row.original) for row in rows[:-1]] == [
        (number, "open_quote", line) for number, line in enumerate(swallowed, 2)
    ]
    assert outcome(rows[-1]) == "parsed"


@pytest.mark.parametrize(
    "text",
    [
        "Ma liste :\npommes, poires, cerises\nfin",
        "Mes notes :\n1, bien, 2\n2, mal, 3\nfin",
        "Dates :\n1, Lyon, 2024-05-06\nle soir, Brest, 2024-05-07",
        "a\nb, c",
        "a\n,,\n\n1,2",
    ],
)
def test_a_list_in_a_cell_is_no_row(tmp_path, text):
    (row,) = read(tmp_path, HEADER + f'1,"{text}",2024-05-06\n'.encode())
    assert row.record.messages[1].content == text
    last = source("text", prompt="Style", columns={"text": "texte", "group": "date"})
    (row,) = read(tmp_path, b"texte,date\n" + f'"{text}",2024-05-06\n'.encode(), last)
    assert row.record.messages[1].content == text
    only = source("prompt_completion", columns={"prompt": "q", "completion": "r"})
    (row,) = read(tmp_path, b"q,r\n" + f'Combien ?,"{text}"\n'.encode(), only)
    assert row.record.messages[1].content == text


def test_no_chunk_starts_between_quotes(tmp_path, monkeypatch):
    block = b'1,"ouvert,2020-01-01\n2,deux,2020-01-02\n3,trois,2020-01-03\n4,24",2020-01-04\n5,x,2020-01-05\n'
    (tmp_path / "t.csv").write_bytes(HEADER + block * 9)
    whole = list(parse_chunk(tmp_path, Chunk("t.csv", 0, None, 1), TWEETS))
    monkeypatch.setattr(lines, "CHUNK_BYTES", 20)
    cut = chunks(tmp_path, "t.csv", TWEETS)
    assert len(cut) == 10
    assert [row for chunk in cut for row in parse_chunk(tmp_path, chunk, TWEETS)] == whole
    assert [outcome(row) for row in whole] == [*["open_quote"] * 4, "parsed"] * 9


def test_a_quote_that_closes_nowhere_near_costs_one_line(tmp_path):
    rest = b"2,x,2024-01-01\n" * 10_050
    rows = read(tmp_path, HEADER + b'1,"ouvert,2024-01-01\n' + rest + b'3,"y",2024-01-01\n')
    assert [outcome(row) for row in rows] == ["broken_csv", *["parsed"] * 10_051]


def test_a_cell_of_twenty_lines_is_a_cell(tmp_path):
    (row,) = read(tmp_path, HEADER + b'1,"' + b"vers\n" * 19 + b'fin",2024-01-01\n')
    assert row.record.messages[1].content == "vers\n" * 19 + "fin"


def test_a_named_column_that_stands_twice_in_the_header_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"column\(s\) texte more than once in the header: texte, date, texte"):
        check(tmp_path, b"texte,date,texte\na,2024,b\n")
    check(tmp_path, b"texte,x,x,date\na,1,2,2024\n")


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_an_error_that_names_it(tmp_path, content):
    with pytest.raises(DataError, match=r"file is empty\n  where:  t\.csv"):
        check(tmp_path, content)


def test_a_header_that_is_no_row_or_no_utf8_is_an_error(tmp_path):
    with pytest.raises(DataError, match="the first row is not a header of columns"):
        check(tmp_path, b'"id,texte\n')
    with pytest.raises(DataError, match="the header is not UTF-8: byte 0xe9 at 1 of the row"):
        check(tmp_path, b"t\xe9xte\na\n")


def test_filters_compare_what_a_cell_spells(tmp_path):
    filters = [{"column": "lang", "any_of": ["fr", None]}, {"column": "deleted", "any_of": [False]}]
    rows = read(
        tmp_path, b"text,lang,deleted\nab,fr,False\nab,en,false\nab,,true\nab,,false\n", source("text", filters=filters)
    )
    assert [outcome(row) for row in rows] == ["parsed", "filtered_lang", "filtered_deleted", "parsed"]
