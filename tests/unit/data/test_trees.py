import json

from parsing_support import outcome, parse, source, turns

COLUMNS = {"tree": "message_tree_id", "language": "lang"}
FILTERS = [{"column": "lang", "any_of": ["fr", "en"]}, {"column": "deleted", "any_of": [False]}]


def message(identity, parent, role, rank=None, lang="fr", **more):
    return {
        "message_id": identity,
        "parent_id": parent,
        "message_tree_id": identity.split(".")[0],
        "role": role,
        "text": f"text of {identity}",
        "lang": lang,
        "rank": rank,
        "deleted": False,
        "review_result": True,
        "tree_state": "ready_for_export",
        **more,
    }


def read(tmp_path, *messages, paths="best"):
    content = "\n".join(json.dumps(value) for value in messages).encode()
    described = source("message_tree", columns=COLUMNS, filters=FILTERS, paths=paths)
    return parse(tmp_path, "oasst2.jsonl", content, described)


# Two trees, whose messages do not stand together; a child comes before its parent.
TREES = [
    message("A.2", "A", "assistant", 1),
    message("A", None, "prompter"),
    message("B", None, "prompter", lang="en"),
    message("A.1", "A", "assistant", 0),
    message("B.1", "B", "assistant", None, lang="en"),
    message("A.1.1", "A.1", "prompter", None),
    message("A.1.2", "A.1", "prompter", 1),
    message("A.1.2.1", "A.1.2", "assistant", 0),
    message("A.1.2.1.1", "A.1.2.1", "prompter", 0),
    message("B.2", "B", "assistant", 5, lang="en"),
]


def path(*identities):
    return [("assistant" if index % 2 else "user", f"text of {name}") for index, name in enumerate(identities)]


def test_oasst2_best_paths(tmp_path):
    rows = read(tmp_path, *TREES)
    records = [row for row in rows if outcome(row) == "parsed"]
    assert [turns(row) for row in records] == [path("A", "A.1", "A.1.2", "A.1.2.1"), path("B", "B.2")]
    assert [(row.record.group, row.record.language, row.place.line) for row in records] == [
        ("s/A", "fr", 8),
        ("s/B", "en", 10),
    ]
    assert [(row.place.line, row.reason) for row in rows if row not in records] == [
        (1, "not_best_path"),
        (5, "not_best_path"),
        (6, "no_answer"),
        (9, "no_answer"),
    ]


def test_oasst2_all_paths(tmp_path):
    rows = read(tmp_path, *TREES, paths="all")
    assert [turns(row) for row in rows if outcome(row) == "parsed"] == [
        path("A", "A.2"),
        path("B", "B.1"),
        path("A", "A.1", "A.1.2", "A.1.2.1"),
        path("B", "B.2"),
    ]
    assert [(row.place.line, row.reason) for row in rows if outcome(row) != "parsed"] == [
        (6, "no_answer"),
        (9, "no_answer"),
    ]


def test_a_filter_cuts_off_the_message_and_all_below_it(tmp_path):
    rows = read(
        tmp_path,
        message("A", None, "prompter"),
        message("A.1", "A", "assistant", 0, deleted=True),
        message("A.1.1", "A.1", "prompter", 0),
        message("A.2", "A", "assistant", 1),
        message("B", None, "prompter", lang="es"),
        message("B.1", "B", "assistant", lang="es"),
        message("C", None, "prompter"),
    )
    assert [(row.place.line, outcome(row)) for row in rows] == [
        (2, "filtered_deleted"),
        (3, "filtered_deleted"),
        (4, "parsed"),
        (5, "filtered_lang"),
        (6, "filtered_lang"),
        (7, "no_answer"),
    ]
    assert turns(rows[2]) == path("A", "A.2")


def test_a_filter_comes_before_everything_else_that_is_asked_of_a_message(tmp_path):
    rows = read(
        tmp_path,
        message("A", None, "prompter", lang="es", text=None),
        message("A.1", "A", "assistant"),
        message("B.1", "B", "assistant", lang="es"),
        message("C", None, "narrator", lang="es"),
        message("D", None, "prompter", "best", lang="es"),
        {"lang": "es"},
        message("F", 3, "prompter", lang="es"),
        message("F", None, "prompter", lang="es"),
    )
    assert [outcome(row) for row in rows] == ["filtered_lang"] * 8


def test_a_language_that_no_text_can_hold_is_a_fault(tmp_path):
    rows = parse(
        tmp_path,
        "a.jsonl",
        b'{"message_id": "A", "parent_id": null, "role": "user", "text": "q", "language": "\\ud800"}\n'
        b'{"message_id": "B", "parent_id": "A", "role": "assistant", "text": "r"}\n',
        source("message_tree"),
    )
    assert [outcome(row) for row in rows] == ["lone_surrogate"]


def test_orphans_cycles_and_doubles_are_faults_with_all_below_them(tmp_path):
    rows = read(
        tmp_path,
        message("A.1", "A", "assistant"),
        message("A.1.1", "A.1", "prompter"),
        message("B.1", "B.2", "assistant"),
        message("B.2", "B.1", "prompter"),
        message("B.3", "B.2", "assistant"),
        message("C.1", "C.1", "assistant"),
        message("D", None, "prompter"),
        message("D.1", "D", "assistant"),
        message("D.1", "D", "assistant"),
        message("E", None, "narrator"),
        message("F", None, "prompter", text=None),
        message("G", None, "prompter", "best"),
        message("H", None, "prompter"),
        message("H.1", "H", "assistant", text=" "),
    )
    assert [outcome(row) for row in rows] == [
        "orphan_message",
        "orphan_message",
        "message_cycle",
        "message_cycle",
        "message_cycle",
        "message_cycle",
        "parsed",
        "duplicate_message",
        "unknown_role",
        "missing_field",
        "wrong_type",
        "empty_assistant",
    ]
    assert rows[1].detail == "the parent A of A.1 is not in the file"
    assert rows[7].detail == "message D.1 is also on line 8"
    assert rows[11].original.count(b"message_id") == 2


def test_a_tree_of_ten_thousand_turns_is_followed_without_recursion(tmp_path):
    chain = [message("A", None, "prompter")]
    for n in range(1, 10_000):
        role = "assistant" if n % 2 else "prompter"
        chain.append({**message("A", chain[-1]["message_id"], role), "message_id": f"A.{n}"})
    (row,) = read(tmp_path, *chain)
    assert len(row.record.messages) == 10_000
