"""Tiny files of the shapes that the recipes' datasets have on the Hub, made from the sample data of this repository."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from typing import Any

import pyarrow as pa
from clone import ROOT
from pyarrow import parquet

SAMPLE = ROOT / "data/sample"
ROWS = 70
Pair = tuple[str, str]


def pairs(language: str) -> list[Pair]:
    """Questions and answers of the sample's chats, each pair once, the planted faults left out."""
    text = (SAMPLE / f"chat_{language}.chatml").read_bytes().decode("utf-8", "ignore")
    found = re.findall(r"<\|user\|>\n([^<]{8,}?)\n<\|assistant\|>\n([^<]{8,}?)\n", text)
    clean = dict.fromkeys(pair for pair in found if not re.search("[ÃâÂ&]", "".join(pair)))
    assert len(clean) >= 100
    return list(clean)


def tool_chats() -> list[dict[str, Any]]:
    """The sample's chats that call a tool: question, tools, call, result, answer."""
    chats = []
    for line in (SAMPLE / "tools.jsonl").read_text(encoding="utf-8", errors="ignore").splitlines():
        if not re.match(r'\{"(messages|tools)".*\}$', line):
            continue
        row = json.loads(line)
        turns = {turn.get("role"): turn for turn in row.get("messages", [])}
        calls = [turn for turn in row.get("messages", []) if turn.get("tool_calls")]
        if calls and {"user", "tool", "assistant"} <= set(turns) and row.get("tools"):
            function = calls[0]["tool_calls"][0].get("function", calls[0]["tool_calls"][0])
            arguments = function["arguments"]
            call = {
                "name": function["name"],
                "arguments": json.loads(arguments) if isinstance(arguments, str) else arguments,
            }
            tools = json.loads(row["tools"]) if isinstance(row["tools"], str) else row["tools"]
            functions = [tool.get("function", tool) for tool in tools]
            question, answer = turns["user"]["content"], row["messages"][-1]["content"]
            chats.append(
                {
                    "question": question,
                    "tools": functions,
                    "call": call,
                    "result": turns["tool"]["content"],
                    "answer": answer,
                }
            )
    assert len(chats) >= 30
    return chats


def lines(rows: list[dict[str, Any]]) -> bytes:
    """JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def zipped(content: bytes) -> bytes:
    """The same bytes for the same content: no time inside."""
    return gzip.compress(content, mtime=0)


def table(columns: list[str], rows: list[Pair]) -> bytes:
    """A CSV file with a header."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet_of(rows: list[dict[str, Any]]) -> bytes:
    """A Parquet file, structs and lists as `datasets` writes them."""
    sink = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def message_tree(index: int, pair: Pair, language: str) -> list[dict[str, Any]]:
    """One question, two ranked answers, and a deleted third one."""
    common = {"message_tree_id": f"t{index}", "lang": language, "deleted": False}
    question = {**common, "message_id": f"q{index}", "parent_id": None, "role": "prompter", "text": pair[0]}
    answers = [
        {**common, "message_id": f"a{index}{rank}", "parent_id": f"q{index}", "role": "assistant", "rank": rank}
        for rank in (1, 0)
    ]
    answers[0]["text"], answers[1]["text"] = "Je ne sais pas.", pair[1]
    gone = {**answers[0], "message_id": f"x{index}", "deleted": True, "rank": 2}
    return [{**question, "rank": None}, *answers, gone]


def glaive(chat: dict[str, Any]) -> dict[str, str]:
    """A row of function calls as Glaive writes them, arguments in single quotes."""
    listed = "\n".join(json.dumps(tool, ensure_ascii=False, indent=4) for tool in chat["tools"])
    arguments = json.dumps(chat["call"]["arguments"], ensure_ascii=False)
    call = f'{{"name": "{chat["call"]["name"]}", "arguments": \'{arguments}\'}}'
    return {
        "system": f"SYSTEM: You are a helpful assistant with access to the following functions. "
        f"Use them if required -\n{listed}",
        "chat": f"USER: {chat['question']}\n\n\nASSISTANT: <functioncall> {call} <|endoftext|>\n\n\n"
        f"FUNCTION RESPONSE: {chat['result']}\n\n\nASSISTANT: {chat['answer']} <|endoftext|>\n\n\n",
    }


def local_files(recipe: str) -> dict[str, bytes]:
    """What a user of the recipe puts below `fetch.local_dir`."""
    french = pairs("fr")
    if recipe == "dolores_v5":
        turns = [
            f"<|system|>\nTu es Dolores.\n<|user|>\n{question}\n<|assistant|>\n{answer}\n"
            for question, answer in french[:120]
        ]
        return {"train.chatml": "\n".join(turns).encode()}
    if recipe == "tweet_style":
        return {"tweets_tous.csv": (SAMPLE / "tweets.csv").read_bytes()}
    if recipe == "gpt2_guide":
        return {"dataset.csv": table(["question", "reponse"], [*french[:100], ("Une question sans réponse ?", "")])}
    return {}


def hub_files(recipe: str) -> dict[str, dict[str, bytes]]:
    """What the Hub holds for a recipe: repository -> path -> content."""
    if recipe == "lora_mix":
        return lora_mix_files()
    return french_sft_files() if recipe == "french_sft" else {}


def web_text(language: str) -> bytes:
    """Rows of C4, zipped."""
    texts = [f"{question} {answer}" for question, answer in pairs(language)]
    rows = [{"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://example.org/"} for text in texts]
    return zipped(lines(rows))


def lora_mix_files() -> dict[str, dict[str, bytes]]:
    """ultrachat, hh-rlhf, oasst2, vigogne, xLAM, Glaive and C4."""
    english, french, tools = pairs("en"), pairs("fr"), tool_chats()
    chats = [
        {
            "prompt": question,
            "prompt_id": str(index),
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        }
        for index, (question, answer) in enumerate(english[:ROWS])
    ]
    preferred = [
        {
            "chosen": f"\n\nHuman: {question}\n\nAssistant: {answer}",
            "rejected": f"\n\nHuman: {question}\n\nAssistant: No.",
        }
        for question, answer in english[ROWS : 2 * ROWS]
    ]
    trees = [row for index, pair in enumerate(french[:ROWS]) for row in message_tree(index, pair, "fr")]
    trees += message_tree(ROWS, ("¿Abrís los lunes?", "No, los lunes cerramos."), "es")
    alpaca = [{"instruction": question, "input": "", "output": answer} for question, answer in french[ROWS : 2 * ROWS]]
    xlam = [
        {
            "id": index,
            "query": chat["question"],
            "tools": json.dumps(chat["tools"]),
            "answers": json.dumps([chat["call"]]),
        }
        for index, chat in enumerate(tools[::2])
    ]
    return {
        "datasets/allenai/c4": {
            "en/c4-train.00000-of-01024.json.gz": web_text("en"),
            "multilingual/c4-fr.tfrecord-00000-of-02048.json.gz": web_text("fr"),
        },
        "datasets/HuggingFaceH4/ultrachat_200k": {
            "data/train_sft-00000-of-00003-a3ecf92756993583.parquet": parquet_of(chats)
        },
        "datasets/Anthropic/hh-rlhf": {"helpful-base/train.jsonl.gz": zipped(lines(preferred))},
        "datasets/OpenAssistant/oasst2": {"2023-11-05_oasst2_ready.messages.jsonl.gz": zipped(lines(trees))},
        "datasets/bofenghuang/vigogne-instruction-following-v1.0": {"train.jsonl": lines(alpaca)},
        "datasets/Salesforce/xlam-function-calling-60k": {
            "xlam_function_calling_60k.json": json.dumps(xlam, ensure_ascii=False).encode()
        },
        "datasets/glaiveai/glaive-function-calling-v2": {
            "glaive-function-calling-v2.json": json.dumps([glaive(chat) for chat in tools[1::2]]).encode()
        },
    }


def french_sft_files() -> dict[str, dict[str, bytes]]:
    """The five French sets and C4."""
    french = pairs("fr")
    parts = [french[start::5] for start in range(5)]

    def sharegpt(part: list[Pair]) -> bytes:
        turns = [[{"from": "human", "value": question}, {"from": "gpt", "value": answer}] for question, answer in part]
        return json.dumps([{"id": str(index), "conversations": turn} for index, turn in enumerate(turns)]).encode()

    ultralink = [
        {"id": index, "data": [*first, *second]}
        for index, (first, second) in enumerate(zip(parts[3], parts[0], strict=False))
    ]
    instruct = [
        {
            "context": "Tu es un assistant." if index % 2 else None,
            "conversation": [{"role": "user", "text": question}, {"role": "assistant", "text": answer}],
        }
        for index, (question, answer) in enumerate(parts[4])
    ]
    return {
        "datasets/allenai/c4": {"multilingual/c4-fr.tfrecord-00000-of-02048.json.gz": web_text("fr")},
        "datasets/FreedomIntelligence/alpaca-gpt4-french": {"alpaca-gpt4-french.json": sharegpt(parts[0])},
        "datasets/FreedomIntelligence/evol-instruct-french": {"evol-instruct-french.json": sharegpt(parts[1])},
        "datasets/FreedomIntelligence/sharegpt-french": {"sharegpt-french.json": sharegpt(parts[2])},
        "datasets/R0k1e/UltraLink": {
            "README.md": b"# UltraLink\n",
            "en_chat_agnostic.jsonl": b'{"data": ["not", "asked for"]}\n',
            "fr_chat_agnostic.jsonl": lines(ultralink[::2]),
            "fr_math.jsonl": lines(ultralink[1::2]),
        },
        "datasets/angeluriot/french_instruct": {
            "README.md": b"# French Instruct\n",
            "dataset.parquet": parquet_of(instruct),
            "resources/misc/charts.png": b"no data",
        },
    }
