"""The committed sample files are what make_sample.py writes, and hold the faults that data/sample/README.md states."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from finetune.data.cleaning.dedup import content_key
from finetune.data.cleaning.examine import examine
from finetune.data.cleaning.words import fold
from finetune.data.reading.formats import chunks, parse_chunk
from finetune.data.rows import Fault, Parsed, Row
from finetune.data_sections import Clean
from finetune.params import load_params

SAMPLE = Path(__file__).parents[2] / "data" / "sample"
FILES = ("chat_fr.chatml", "chat_en.chatml", "tools.jsonl", "support_sharegpt.jsonl", "tweets.csv")
REPAIRED = ("mojibake", "html_entity")
MOJIBAKE = re.compile("Ã[\u0080-ÿ©¨ªâ€]|â€™")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, int]]]:
    """A folder with freshly made files, and the counts that the script logs, by file."""
    folder = tmp_path_factory.mktemp("sample")
    command = [sys.executable, str(SAMPLE / "make_sample.py"), str(folder)]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    done = subprocess.run(command, check=True, capture_output=True, env=environment)
    logged = [json.loads(line) for line in done.stderr.decode("utf-8").splitlines()]
    return folder, {row.pop("file"): row for row in logged}


def readme_tables() -> list[list[list[str]]]:
    tables: list[list[list[str]]] = [[]]
    for line in (SAMPLE / "README.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            tables[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif tables[-1]:
            tables.append([])
    return [table for table in tables if table]


def stated_faults() -> dict[str, dict[str, int]]:
    header, _, *rows = readme_tables()[1]
    files = header[1:-1]
    return {
        file: {row[0]: int(row[place]) for row in rows if row[place] != "0"}
        for place, file in enumerate(files, start=1)
    }


def conversations(content: bytes) -> list[bytes]:
    return content.split(b"\n\n<|")


def json_rows(content: bytes) -> list[object]:
    rows: list[object] = []
    for line in content.decode("utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            rows.append(None)
    return rows


def tweets() -> list[str]:
    text = (SAMPLE / "tweets.csv").read_bytes().decode("utf-8", "replace")
    return [row["texte"] for row in csv.DictReader(io.StringIO(text))]


def row_count(name: str) -> int:
    content = (SAMPLE / name).read_bytes()
    if name.endswith(".chatml"):
        return len(conversations(content))
    return len(tweets()) if name.endswith(".csv") else len(json_rows(content))


def test_script_makes_the_committed_files(made: tuple[Path, dict[str, dict[str, int]]]) -> None:
    folder, _ = made
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    different = [name for name in FILES if (folder / name).read_bytes() != (SAMPLE / name).read_bytes()]
    assert different == []


def test_script_leaves_nothing_beside_itself(made: tuple[Path, dict[str, dict[str, int]]]) -> None:
    expected = {*FILES, "README.md", "faults.py", "make_sample.py", "phrases.json", "tool_calls"}
    assert {path.name for path in SAMPLE.iterdir()} == expected


def test_readme_states_the_faults_that_are_planted(made: tuple[Path, dict[str, dict[str, int]]]) -> None:
    _, logged = made
    planted = {file: {kind: count for kind, count in row.items() if kind != "good"} for file, row in logged.items()}
    assert stated_faults() == planted


def test_readme_states_the_rows(made: tuple[Path, dict[str, dict[str, int]]]) -> None:
    _, logged = made
    for name, _, rows, good, _ in readme_tables()[0][2:]:
        unwanted = sum(count for kind, count in logged[name].items() if kind not in ("good", *REPAIRED))
        assert (name, int(rows), int(good)) == (name, row_count(name), logged[name]["good"])
        assert int(rows) == int(good) + unwanted
    assert sum(row["good"] for row in logged.values()) == 784


def test_reading_and_rules_do_what_the_readme_says() -> None:
    readme = (SAMPLE / "README.md").read_text(encoding="utf-8")
    params = load_params(SAMPLE.parents[1] / "recipes" / "smoke" / "params.yaml")
    counts: dict[str, Counter[str]] = {}
    seen: set[bytes] = set()
    for source in params.fetch.sources:
        file = source.origin.files
        count = counts[file] = Counter()
        for chunk in chunks(SAMPLE, file, source):
            for row in parse_chunk(SAMPLE, chunk, source):
                count["rows_in"] += 1
                count[judged(row, params.clean, seen, count)] += 1
    total: Counter[str] = sum(counts.values(), Counter())
    assert (
        f"In all {total['rows_in']} rows, of which reading and the rules of `clean` leave {total['kept']}: "
        f"{total['dropped']} are dropped by rule, {total['duplicates']} are duplicates, "
        f"{total['quarantined']} cannot be read."
    ) in readme
    assert [count["kept"] for count in counts.values()] == [int(row[3]) for row in readme_tables()[0][2:]]
    repaired = {file: sum(row.get(kind, 0) for kind in REPAIRED) for file, row in stated_faults().items()}
    assert {file: count["repaired_texts"] for file, count in counts.items()} == repaired


def judged(row: Row, rules: Clean, seen: set[bytes], count: Counter[str]) -> str:
    """What becomes of one row before near-duplicates and contamination are looked for."""
    if not isinstance(row, Parsed):
        return "quarantined" if isinstance(row, Fault) else "dropped"
    examined = examine(row.record, rules)
    count["repaired_texts"] += examined.texts_by_repair.total()
    key = content_key(fold(examined.record))
    if examined.reason is not None:
        return "dropped"
    if key in seen:
        return "duplicates"
    seen.add(key)
    return "kept"


@pytest.mark.parametrize(
    ("start", "fault"), [("RT @", "retweet"), ("https://", "link_only"), ("Bonjour", "automatic_reply")]
)
def test_tweets_hold_the_stated_unwanted_ones(start: str, fault: str) -> None:
    found = sum(text.startswith((start, "Message automatique") if start == "Bonjour" else start) for text in tweets())
    assert found == stated_faults()["tweets.csv"][fault]


def test_tweets_hold_the_stated_entities_and_line_breaks() -> None:
    assert sum("&amp;" in text for text in tweets()) == stated_faults()["tweets.csv"]["html_entity"]
    assert sum("\n" in text for text in tweets()) >= 10


@pytest.mark.parametrize("name", FILES)
def test_mojibake_is_where_it_is_stated(name: str) -> None:
    content = (SAMPLE / name).read_bytes().decode("utf-8", "replace")
    rows = tweets() if name.endswith(".csv") else content.split("\n")
    assert sum(MOJIBAKE.search(row) is not None for row in rows) == stated_faults()[name].get("mojibake", 0)


@pytest.mark.parametrize("name", FILES)
def test_invalid_utf8_is_where_it_is_stated(name: str) -> None:
    rows = [(SAMPLE / name).read_bytes()]
    if name.endswith(".chatml"):
        rows = conversations(rows[0])
    elif name.endswith(".csv"):
        rows = rows[0].split(b"\n")
    found = sum("\ufffd" in row.decode("utf-8", "replace") for row in rows)
    assert found == stated_faults()[name].get("invalid_utf8", 0)


@pytest.mark.parametrize("name", ["tools.jsonl", "support_sharegpt.jsonl"])
def test_broken_json_is_where_it_is_stated(name: str) -> None:
    rows = json_rows((SAMPLE / name).read_bytes())
    assert rows.count(None) == stated_faults()[name]["broken_json"]


@pytest.mark.parametrize("name", ["chat_fr.chatml", "chat_en.chatml"])
def test_conversations_without_an_answer_are_stated(name: str) -> None:
    silent = [row for row in conversations((SAMPLE / name).read_bytes()) if b"<|assistant|>" not in row]
    assert len(silent) == stated_faults()[name]["no_answer"]


def test_exact_duplicates_of_json_rows_are_stated() -> None:
    for name in ("tools.jsonl", "support_sharegpt.jsonl"):
        lines = (SAMPLE / name).read_text(encoding="utf-8").splitlines()
        assert len(lines) - len(set(lines)) == stated_faults()[name]["exact_duplicate"]


def test_tool_calls_match_an_offered_tool() -> None:
    called = 0
    for row in json_rows((SAMPLE / "tools.jsonl").read_bytes()):
        if not isinstance(row, dict) or "messages" not in row:
            continue
        offered = {tool["function"]["name"]: tool["function"]["parameters"] for tool in row.get("tools", [])}
        for message in row["messages"]:
            for call in message.get("tool_calls", []):
                called += 1
                assert list(call["function"]["arguments"]) == offered[call["function"]["name"]]["required"]
    assert called >= 70


def test_no_model_is_trained_on_a_tool_call_question() -> None:
    training = "".join((SAMPLE / name).read_bytes().decode("utf-8", "replace") for name in FILES)
    rows = [row for name in ("simple", "irrelevance") for row in questions(f"workshop_{name}.jsonl")]
    assert len(rows) == 14
    assert [text for row in rows for text in [row["question"][0][-1]["content"]] if text in training] == []


def test_tool_call_questions_offer_what_the_training_text_offers() -> None:
    tools = {tool["function"]["name"]: tool["function"] for tool in offered_in_training()}
    for row in questions("workshop_simple.jsonl") + questions("workshop_irrelevance.jsonl"):
        for function in row["function"]:
            as_trained = {**function, "parameters": {**function["parameters"], "type": "object"}}
            assert as_trained == tools.get(function["name"], as_trained)


def questions(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SAMPLE / "tool_calls" / name).read_text(encoding="utf-8").splitlines()]


def offered_in_training() -> list[dict[str, Any]]:
    rows = [row for row in json_rows((SAMPLE / "tools.jsonl").read_bytes()) if isinstance(row, dict)]
    return [tool for row in rows for tool in row.get("tools", [])]


def test_sample_is_small() -> None:
    size_bytes = sum((SAMPLE / name).stat().st_size for name in FILES)
    assert 150_000 < size_bytes < 250_000
