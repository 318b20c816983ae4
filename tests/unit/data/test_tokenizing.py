import json

import pytest
from test_chat import TWO_TURNS, chat
from test_encoder import trained

from finetune.chat_template import compile_template
from finetune.data.encoding import tokenizing
from finetune.data.encoding.chat import Chat, SpecialIds
from finetune.data.encoding.encoder import make_encoder
from finetune.data.encoding.tokenizing import check_totals, line_ranges, read_range, token_metrics, tokenize_records
from finetune.data.record import Message, make_record
from finetune.data_sections import Tokenize
from finetune.errors import DataError

SHORT = make_record(source="t", messages=(Message("user", "a"), Message("assistant", "b")))
LONG = make_record(source="t", messages=(Message("user", "a" * 40), Message("assistant", "b")))
SPELLS_EOS = make_record(source="t", messages=(Message("user", "a</s>b"), Message("assistant", "b")))
NOTHING_CUT = {
    "truncated": 0,
    "truncated_trained": 0,
    "cut_tokens": 0,
    "split": 0,
    "split_pieces": 0,
    "dropped_exchanges": 0,
    "tools_cut_by_ollama": 0,
}


def tokenized(records, of=None, max_tokens=16, over_length="drop"):
    of = of or chat()
    params = Tokenize(max_tokens=max_tokens, over_length=over_length, loss="assistant")
    return tokenize_records(records, of, make_encoder(of.tokenizer), params)


def test_each_record_is_kept_or_counted_under_its_reason():
    part = tokenized([TWO_TURNS, SHORT, LONG, SPELLS_EOS])
    assert part.rows.to_pylist()[1] == {
        "id": SHORT.id,
        "source": "t",
        "group": SHORT.group,
        "language": None,
        "input_ids": [2, 9, 4, 8, 5, 3],
        "trained": [False, False, False, False, True, True],
    }
    assert part.rows.column("input_ids")[0].as_py() == [2, 9, 4, 5, 8, 6, 3, 9, 7, 8, 6, 7, 3]
    check_totals(part.totals)
    metrics = token_metrics(part.totals)
    assert metrics["sources"]["t"] == {
        "records_in": 3,
        "kept": 1,
        "dropped": {"over_length": 1, "special_token_in_text": 1},
        "rows": 1,
        "tokens": 6,
        "trained_tokens": 2,
        "trained_share": 0.3333,
        "straddling_tokens": 0,
        **NOTHING_CUT,
    }
    assert (metrics["records_in"], metrics["kept"], metrics["longest_tokens"]) == (4, 2, 13)
    assert dict(part.totals.lengths) == {("s", 32): 1, ("t", 32): 1, ("t", 64): 1}


def test_the_pieces_of_a_split_record_are_numbered_and_counted():
    part = tokenized([SHORT, TWO_TURNS], max_tokens=8, over_length="split")
    assert part.rows.column("id").to_pylist() == [SHORT.id, f"{TWO_TURNS.id}#1", f"{TWO_TURNS.id}#2"]
    assert part.rows.column("group").to_pylist() == [SHORT.group, TWO_TURNS.group, TWO_TURNS.group]
    counts = token_metrics(part.totals)["sources"]["s"]
    wanted = {"records_in": 1, "kept": 1, "rows": 2, "split": 1, "split_pieces": 2, "tokens": 14}
    assert {name: counts[name] for name in wanted} == wanted
    check_totals(part.totals)


def test_what_truncation_takes_is_counted():
    part = tokenized([TWO_TURNS, SHORT, LONG], max_tokens=12, over_length="truncate")
    metrics = token_metrics(part.totals)
    wanted = {"kept": 2, "truncated": 1, "truncated_trained": 1, "cut_tokens": 1, "longest_tokens": 12}
    assert {name: metrics[name] for name in wanted} == wanted
    assert metrics["dropped"] == {"no_trained_token_left": 1}


def test_over_length_refuse_names_the_record():
    with pytest.raises(DataError, match=f"record {LONG.id} of source t has 45 tokens, more than 16"):
        tokenized([SHORT, LONG], over_length="refuse")


@pytest.mark.parametrize("records", [[], [LONG]])
def test_nothing_left_is_an_error(records):
    with pytest.raises(DataError, match="nothing is left to train on"):
        check_totals(tokenized(records).totals)


def test_a_record_without_a_trained_token_is_an_error_of_the_template_or_dropped():
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{% endgeneration %}"
        "{% endif %}{% endfor %}{{ eos_token }}"
    )
    with pytest.raises(DataError, match="2 turns are trained and 0 of them end"):
        tokenized([TWO_TURNS], chat(template))
    empty = make_record(source="u", text="")
    assert tokenized([SHORT, empty]).totals.counts["u"].dropped == {}


def fast_chat():
    template = "{{ bos_token }}{% for m in messages %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
    template += "{% endfor %}"
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|user|>"}
    return Chat(
        trained(),
        compile_template(template, tokens, "t.jinja"),
        SpecialIds(0, 1, 2, 500, needs_bos=True),
        ("<s>", "</s>", "<|user|>"),
    )


def test_a_sample_is_encoded_both_ways_and_a_difference_is_an_error(monkeypatch):
    record = make_record(source="s", messages=(Message("assistant", "zé"),))
    of = fast_chat()
    encoder = make_encoder(of.tokenizer)
    params = Tokenize(max_tokens=50, over_length="drop", loss="assistant")
    assert tokenize_records([record], of, encoder, params).totals.slow_because is None
    encoder.fast.ids[encoder.fast.encoding.encode("z")[0]] += 1
    with pytest.raises(DataError, match="tiktoken gives other ids or another mask than the tokenizers library"):
        tokenize_records([record], of, encoder, params)


def test_ranges_end_at_line_ends_and_cover_the_file_once(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizing, "RANGE_BYTES", 300)
    path = tmp_path / "records.jsonl"
    records = [make_record(source="s", text="é" * length) for length in (0, 1, 400, 3, 4, 5)]
    lines = [json.dumps(record.to_row(), ensure_ascii=False).encode() + b"\n" for record in records]
    path.write_bytes(b"".join(lines))
    ranges = list(line_ranges(path))
    assert len(ranges) > 2
    assert [start for start, _ in ranges] == [0, *(end for _, end in ranges[:-1])]
    assert ranges[-1][1] == path.stat().st_size
    assert [record for places in ranges for record in read_range(path, *places)] == records
    with pytest.raises(DataError, match=r"records.jsonl, byte 3\n"):
        list(read_range(path, 3, 4))
    with pytest.raises(DataError, match="file is missing"):
        next(line_ranges(tmp_path / "none"))


def test_records_whose_functions_lose_keys_in_ollama_are_counted():
    def offering(**more):
        parameters = {"type": "object", "properties": {"day": {"type": "string", **more}}}
        tools = json.dumps([{"name": "hours", "description": "d", "parameters": parameters}])
        return make_record(source="s", messages=SHORT.messages, tools=tools)

    part = tokenized([offering(), offering(default="monday"), SHORT], max_tokens=500)
    assert part.totals.counts["s"].tools_cut_by_ollama == 1
