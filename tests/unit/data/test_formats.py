"""One test for each dataset of the recipes: rows of its real shape, written here, become these messages."""

import gzip
import json

import pyarrow
from parsing_support import outcome, parse, source, turns
from pyarrow import parquet

from finetune.data.reading.formats import check_file, chunks, parse_chunk


def lines(*values):
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()


def parquet_rows(folder, values, described):
    parquet.write_table(pyarrow.Table.from_pylist(values), folder / "train.parquet")
    check_file(folder, "train.parquet", described)
    cut = chunks(folder, "train.parquet", described)
    return [row for chunk in cut for row in parse_chunk(folder, chunk, described)]


def test_ultrachat_200k(tmp_path):
    value = {
        "prompt": "Name a river.",
        "prompt_id": "f0e37e9f7800261167ce91143f98f511f768847236f133f2d0aed60b444ebe57",
        "messages": [
            {"content": "Name a river.", "role": "user"},
            {"content": "The Loire.", "role": "assistant"},
            {"content": "Another?", "role": "user"},
            {"content": "The Garonne.", "role": "assistant"},
        ],
    }
    rows = parquet_rows(tmp_path, [value], source("messages"))
    assert [turns(row) for row in rows] == [
        [("user", "Name a river."), ("assistant", "The Loire."), ("user", "Another?"), ("assistant", "The Garonne.")]
    ]


def test_hh_rlhf(tmp_path):
    chosen = [
        "\n\nHuman: How long to boil eggs?\n\nAssistant: Hard or soft?\n\nHuman: Soft.\n\nAssistant: Five.\n\nOr six.",
        '\n\nHuman: Who said "Human: be kind"?\n\nIn a book.\n\nAssistant: I do not know. ',
        "\n\nHuman: Hello?\n\nAssistant:",
        "\n\nHuman: Hello?",
        "\n\nAssistant: Hello.",
        "Hello.\n\nHuman: Hello?\n\nAssistant: Hello.",
        "",
    ]
    content = gzip.compress(lines(*({"chosen": text, "rejected": "\n\nHuman: x\n\nAssistant: y"} for text in chosen)))
    rows = parse(tmp_path, "train.jsonl.gz", content, source("transcript", columns={"transcript": "chosen"}))
    assert [turns(row) for row in rows[:2]] == [
        [
            ("user", "How long to boil eggs?"),
            ("assistant", "Hard or soft?"),
            ("user", "Soft."),
            ("assistant", "Five.\n\nOr six."),
        ],
        [("user", 'Who said "Human: be kind"?\n\nIn a book.'), ("assistant", "I do not know.")],
    ]
    assert [outcome(row) for row in rows[2:]] == [
        "empty_turn",
        "one_sided_dialogue",
        "one_sided_dialogue",
        "text_before_marker",
        "text_before_marker",
    ]


def test_vigogne_and_other_alpaca_sets(tmp_path):
    values = [
        {"instruction": "Traduis en anglais.", "input": "Bonjour", "output": "Hello"},
        {"instruction": "Cite un fleuve.", "input": "", "output": "La Loire."},
        {"instruction": "Cite un fleuve.", "output": ""},
        {"instruction": "Cite un fleuve."},
    ]
    rows = parse(tmp_path, "vigogne.json", json.dumps(values, ensure_ascii=False).encode(), source("alpaca"))
    assert [turns(row) for row in rows[:2]] == [
        [("user", "Traduis en anglais.\n\nBonjour"), ("assistant", "Hello")],
        [("user", "Cite un fleuve."), ("assistant", "La Loire.")],
    ]
    assert [outcome(row) for row in rows[2:]] == ["empty_assistant", "missing_field"]


def test_prompt_and_completion(tmp_path):
    content = lines({"prompt": "Cite un fleuve.", "completion": "La Loire.", "system": "Sois bref.", "group": 7})
    (row,) = parse(tmp_path, "a.jsonl", content, source("prompt_completion"))
    assert turns(row) == [("system", "Sois bref."), ("user", "Cite un fleuve."), ("assistant", "La Loire.")]
    assert row.record.group == "s/7"


def test_sharegpt_of_freedom_intelligence(tmp_path):
    values = [
        {"id": "1", "conversations": [{"from": "human", "value": "Ça va ?"}, {"from": "gpt", "value": "Oui."}]},
        {"id": "2", "conversations": [{"from": "human", "value": "Ça va ?"}, {"from": "bard", "value": "Oui."}]},
        {"id": "3", "conversations": None},
    ]
    rows = parse(tmp_path, "alpaca-gpt4-french.json", json.dumps(values).encode(), source("sharegpt", language="fr"))
    assert turns(rows[0]) == [("user", "Ça va ?"), ("assistant", "Oui.")]
    assert [outcome(row) for row in rows[1:]] == ["unknown_role", "missing_field"]


def test_ultralink(tmp_path):
    values = [
        {"id": 0, "data": ["Qui a peint la Joconde ?", "Léonard de Vinci.", "Quand ?", "Vers 1503."]},
        {"id": 1, "data": ["Qui ?", 3]},
        {"id": 2, "data": []},
    ]
    rows = parse(tmp_path, "ultralink_fr.jsonl", lines(*values), source("turns", columns={"turns": "data"}))
    assert turns(rows[0]) == [
        ("user", "Qui a peint la Joconde ?"),
        ("assistant", "Léonard de Vinci."),
        ("user", "Quand ?"),
        ("assistant", "Vers 1503."),
    ]
    assert [outcome(row) for row in rows[1:]] == ["wrong_type", "empty_conversation"]


def test_french_instruct(tmp_path):
    said = [{"role": "user", "text": "Résume."}, {"role": "assistant", "text": "C'est un conte."}]
    values = [
        {"context": "Il était une fois.", "conversation": said, "author": "human"},
        {"context": None, "conversation": said, "author": "human"},
    ]
    columns = {"messages": "conversation", "content": "text", "system": "context"}
    rows = parquet_rows(tmp_path, values, source("messages", columns=columns))
    spoken = [("user", "Résume."), ("assistant", "C'est un conte.")]
    assert [turns(row) for row in rows] == [[("system", "Il était une fois."), *spoken], spoken]


def test_c4(tmp_path):
    value = {"text": "Une page.\nDeux lignes.", "timestamp": "2019-04-25T12:57:54Z", "url": "https://a.example/b"}
    content = gzip.compress(lines(value, {**value, "text": " \n"}, {"url": "https://a.example/c"}))
    rows = parse(tmp_path, "c4-fr.00000-of-01024.json.gz", content, source("text", language="fr"))
    assert (rows[0].record.text, rows[0].record.messages, rows[0].record.language) == (value["text"], (), "fr")
    assert [outcome(row) for row in rows[1:]] == ["empty_text", "missing_field"]


def test_dolores_chatml(tmp_path):
    content = (
        "<|system|>\nTu es Dolores.\n<|user|>\nQui es-tu ?\n<|assistant|>\nJe suis un modèle.\n\nRien de plus.\n\n"
        "<|user|>\nEt toi ?\n<|assistant|>\nMoi aussi.\n"
    ).encode()
    assert [turns(row) for row in parse(tmp_path, "train.chatml", content, source("chatml"))] == [
        [("system", "Tu es Dolores."), ("user", "Qui es-tu ?"), ("assistant", "Je suis un modèle.\n\nRien de plus.")],
        [("user", "Et toi ?"), ("assistant", "Moi aussi.")],
    ]


def test_tweets(tmp_path):
    content = (
        "id_tweet,texte,date_creation\n"
        '1763500000000000000,"Échecs &amp; maths,\nce soir.",2024-03-01 09:00:00\n'
        "1763500086000000000,RT @club : ce soir,2024-03-01 10:00:00\n"
        "1763500172000000000,,2024-03-02 09:00:00\n"
    ).encode()
    described = source(
        "text",
        prompt="Style: Nimzo | Type: Tweet",
        columns={"text": "texte", "group": "date_creation"},
        group_characters=10,
    )
    rows = parse(tmp_path, "tweets_tous.csv", content, described)
    # Entities, retweets and automatic replies are for the clean stage.
    assert [turns(row) for row in rows[:2]] == [
        [("user", "Style: Nimzo | Type: Tweet"), ("assistant", "Échecs &amp; maths,\nce soir.")],
        [("user", "Style: Nimzo | Type: Tweet"), ("assistant", "RT @club : ce soir")],
    ]
    assert [row.record.group for row in rows[:2]] == ["s/2024-03-01", "s/2024-03-01"]
    assert outcome(rows[2]) == "empty_assistant"


def test_turns_of_an_evaluation_set_stand_in_lists_of_their_own(tmp_path):
    tools = [{"name": "area", "parameters": {"type": "dict", "properties": {"base": {"type": "integer"}}}}]
    value = {"id": "simple_0", "question": [[{"role": "user", "content": "Area?"}]], "function": tools}
    described = source("messages", use="decontamination", columns={"messages": "question", "tools": "function"})
    (row,) = parse(tmp_path, "bfcl.json", lines(value), described)
    assert (turns(row), row.record.tools) == ([("user", "Area?")], json.dumps(tools))
