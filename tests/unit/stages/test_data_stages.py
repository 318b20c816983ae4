"""The five data stages as DVC runs them: one after the other, on files."""

import os
import subprocess
import sys
from collections import Counter
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import pytest

from finetune.data.record import Record
from finetune.errors import DataError
from finetune.io import read_json, read_jsonl, read_parquet, sha256_tree
from finetune.params import load_params
from finetune.stages import clean, fetch, split, tokenize, tokenizer

ROOT = Path(__file__).parents[3]
SMOKE = load_params(ROOT / "recipes" / "smoke" / "params.yaml")
SHARES = {"validation_share": SMOKE.split.validation_share, "test_share": SMOKE.split.test_share}


def run_stages(out: Path, params=SMOKE) -> Path:
    base, cleaned, folder = out / "base_manifest.json", out / "clean", out / "tokenizer"
    sample = params.fetch.model_copy(update={"local_dir": str(ROOT / params.fetch.local_dir)})
    template = {"chat_template": str(ROOT / params.tokenizer.chat_template)}
    fetch.run(out / "raw", base, out / "fetch.json", fetch=sample)
    cleaning = (cleaned, out / "clean.json", out / "f.csv", out / "s.csv")
    clean.run(out / "raw", *cleaning, fetch=sample, clean=params.clean, **SHARES)
    own = params.tokenizer.model_copy(update=template)
    tokenizer.run(
        cleaned, base, folder, out / "tokenizer.json", tokenizer=own, pack_tokens=params.split.pack_tokens, **SHARES
    )
    tokenize.run(cleaned, folder, out / "tokens", out / "tokenize.json", out / "l.csv", tokenize=params.tokenize)
    plots = (out / "split.csv", out / "mix.csv")
    made = [out / f"{name}.json" for name in ("fetch", "clean", "tokenizer", "tokenize")] + [out / "l.csv"]
    outs = (out / "split", out / "report", out / "split.json", *plots)
    split.run(out / "tokens", folder, cleaned, *made, *outs, seed=params.seed, split=params.split)
    return out


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return run_stages(tmp_path_factory.mktemp("smoke"))


def with_source(params, **changes):
    first = params.fetch.sources[0]
    origin = first.origin.model_copy(update={"files": changes.pop("files", "chat.txt")})
    source = first.model_copy(update={"name": "chat", "origin": origin, **changes})
    return params.fetch.model_copy(update={"sources": [source]})


def clean_of(tmp_path, content, **rules):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/chat.txt").write_bytes(content)
    section = with_source(SMOKE).model_copy(update={"local_dir": str(tmp_path / "in")})
    fetch.run(tmp_path / "raw", tmp_path / "base.json", tmp_path / "fetch.json", fetch=section)
    cleaned = tmp_path / "clean"
    rest = (cleaned, tmp_path / "clean.json", tmp_path / "f.csv", tmp_path / "s.csv")
    clean.run(tmp_path / "raw", *rest, fetch=section, clean=SMOKE.clean.model_copy(update=rules), **SHARES)
    return cleaned


def test_every_row_of_the_sample_is_accounted_for(smoke):
    numbers = read_json(smoke / "clean.json")
    lost = sum(numbers["dropped"].values()) + numbers["duplicates"] + numbers["near_duplicates"]
    assert numbers["rows_in"] == numbers["kept"] + lost + sum(numbers["quarantined"].values())
    assert len(list(read_jsonl(smoke / "clean/dropped.jsonl"))) == lost
    assert sorted(numbers["dropped"]) == [
        "answer_too_short",
        "automatic_reply",
        "contaminated_by_held_out",
        "link_only",
        "no_assistant",
        "record_too_long",
        "retweet",
        "roles_do_not_alternate",
    ]
    assert {"broken_json", "empty_assistant", "invalid_utf8", "unknown_role"} <= set(numbers["quarantined"])
    assert sorted(numbers["repaired_texts"]) == ["html_entities", "mojibake"]
    assert len(list(read_jsonl(smoke / "clean/quarantine.jsonl"))) == sum(numbers["quarantined"].values())
    assert len(list(read_jsonl(smoke / "clean/repaired.jsonl"))) == sum(numbers["repaired_texts"].values())
    records = [Record.from_row(row) for row in read_jsonl(smoke / "clean/records.jsonl")]
    assert len({record.id for record in records}) == len(records) == numbers["kept"] > 500


def answers(row):
    """The answers of a row: its runs of trained token ids, of eight at least."""
    pairs = zip(row["input_ids"], row["trained"], strict=True)
    runs = (tuple(token for token, _ in run) for trained, run in groupby(pairs, key=itemgetter(1)) if trained)
    return {run for run in runs if len(run) >= 8}


def test_splits_hold_each_row_once_and_packing_loses_no_trained_token(smoke):
    rows = {name: read_parquet(smoke / f"split/{name}.parquet") for name in ("train", "validation", "test")}
    tokens = read_parquet(smoke / "tokens/tokens.parquet")
    ids = [row["id"] for part in rows.values() for row in part]
    numbers = read_json(smoke / "split.json")
    lost = numbers["splits"]["left_out"]["rows"]
    assert len(set(ids)) == len(ids) == len(tokens) - lost
    assert set(ids) < {row["id"] for row in tokens}
    assert numbers["rows"] == len(tokens)
    by_split = numbers["left_out"]["answer_in_train"]
    assert sum(sum(by_source.values()) for by_source in by_split.values()) == lost > 0
    assert by_split["test"]["chat_fr"] > 0
    plot = (smoke / "split.csv").read_text(encoding="utf-8").splitlines()
    assert sum(int(line.split(",")[2]) for line in plot if line.split(",")[1] == "left_out") == lost
    learned = {answer for row in rows["train"] for answer in answers(row)}
    assert not any(answers(row) & learned for name in ("validation", "test") for row in rows[name])
    groups = Counter(group for part in rows.values() for group in {row["group"] for row in part})
    assert set(groups.values()) == {1}
    packed = read_parquet(smoke / "split/packed.parquet")
    trained = sum(sum(row["trained"][1:]) for row in rows["train"])
    assert trained == sum(label != -100 for row in packed for label in row["labels"])
    assert all(sum(row["seq_lengths"]) == len(row["input_ids"]) <= 512 for row in packed)
    mini = {row["id"] for row in read_parquet(smoke / "split/mini_train.parquet")}
    assert len(mini) == 32
    assert mini < {row["id"] for row in rows["train"]}


def test_an_answer_and_its_stop_token_are_what_is_trained(smoke):
    from finetune.data.vocabulary.tokenizer_files import load_chat

    chat = load_chat(smoke / "tokenizer")
    records = {row["id"]: Record.from_row(row) for row in read_jsonl(smoke / "clean/records.jsonl")}
    row = next(row for row in read_parquet(smoke / "tokens/tokens.parquet") if row["source"] == "tweets")
    learned = [token for token, trained in zip(row["input_ids"], row["trained"], strict=True) if trained]
    answer = records[row["id"]].messages[-1].content
    assert chat.tokenizer.decode(learned, skip_special_tokens=False) == answer + "</s>"


def test_the_same_bytes_under_another_hash_seed_time_zone_and_locale(smoke, tmp_path):
    program = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import test_data_stages as stages; "
        "stages.run_stages(Path(sys.argv[2]))"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "PYTHONHASHSEED": "123",
        "TZ": "Asia/Tokyo",
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
    }
    command = [sys.executable, "-c", program, str(Path(__file__).parent), str(tmp_path)]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True)
    assert sha256_tree(tmp_path) == sha256_tree(smoke)


def test_a_missing_and_an_empty_file_stop_fetch(tmp_path):
    section = with_source(SMOKE, files="absent.chatml").model_copy(update={"local_dir": str(tmp_path)})
    with pytest.raises(DataError, match=r"no file matches 'absent\.chatml'"):
        fetch.run(tmp_path / "raw", tmp_path / "b.json", tmp_path / "f.json", fetch=section)
    (tmp_path / "absent.chatml").write_bytes(b"")
    with pytest.raises(DataError, match="file is empty"):
        fetch.run(tmp_path / "raw", tmp_path / "b.json", tmp_path / "f.json", fetch=section)


GOOD = b"<|user|>\nquestion\n<|assistant|>\nune bonne r\xc3\xa9ponse\n\n"
EMPTY = b"<|user|>\nautre question\n<|assistant|>\n\n"


def test_an_empty_answer_is_quarantined_with_its_place_and_the_stage_goes_on(tmp_path):
    cleaned = clean_of(tmp_path, GOOD + EMPTY, max_quarantined_share=0.5)
    (row,) = read_jsonl(cleaned / "quarantine.jsonl")
    place = (row["file"], row["line"], row["byte_offset"], row["reason"])
    assert place == ("chat/chat.txt", 6, 52, "empty_assistant")
    assert read_json(tmp_path / "clean.json")["kept"] == 1


def test_over_the_share_the_stage_fails_and_the_quarantine_is_there_to_read(tmp_path):
    with pytest.raises(DataError, match=r"1 of 2 rows cannot be read \(empty_assistant 1\), more than the share 0.4"):
        clean_of(tmp_path, GOOD + EMPTY, max_quarantined_share=0.4)
    assert len(list(read_jsonl(tmp_path / "clean/quarantine.jsonl"))) == 1
    assert not (tmp_path / "clean/records.jsonl").exists()


def test_nothing_left_is_an_error(tmp_path):
    with pytest.raises(DataError, match="nothing is left of source chat: 1 rows in, 0 kept, no_assistant 1"):
        clean_of(tmp_path, b"<|user|>\nquestion\n")
