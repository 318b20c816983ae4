"""Chat JSON lines -> packed, masked training rows: this package's stages beside TRL's own preparation, ids compared.

`python benchmarks/prepare_rows.py [MB]` (200 by default) writes benchmarks/prepare_rows.json. Each run is a process of
its own, one after the other: `ours` does what the stages tokenize and split do; `trl` is SFTTrainer with
assistant_only_loss, packing and bfd on the same conversations, tokenizer and template. Then every document is taken out
of the packed rows again, and ids and labels of both sides must be the same multiset.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

import finetune.stages  # noqa: F401 (pins the CPU code path before numpy's and torch's threads start)
from finetune.io import read_json, write_json

RESULT = Path(__file__).with_suffix(".json")
ROOT = Path(__file__).parents[1]
TEMPLATE = ROOT / "recipes" / "smoke" / "chat_template.jinja"
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
MARKERS = ["<|system|>", "<|user|>", "<|assistant|>"]
VOCABULARY, TRAINED_ON_BYTES = 32_000, 20_000_000
PACK_TOKENS = 4096
HELD_OUT = 0.001
SEED = 42
RUNS: dict[str, tuple[str, ...]] = {
    "ours": ("ours",),
    "ours_1_worker": ("ours",),
    "trl": ("trl", "0"),
    "trl_num_proc_2": ("trl", "2"),
}


def main() -> None:
    """Make the data, run both sides, compare, and write the result."""
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCHMARK_DIR")) as name:
        folder = Path(name)
        make_corpus(folder, megabytes)
        make_tokenizer(folder)
        size_bytes = (folder / "chat.jsonl").stat().st_size
        runs, documents = {}, {}
        for run, (side, *arguments) in RUNS.items():
            workers = "1" if run == "ours_1_worker" else str(len(os.sched_getaffinity(0)))
            environment = {**os.environ, "FINETUNE_WORKERS": workers, "HF_DATASETS_CACHE": str(folder / run / "cache")}
            command = [sys.executable, __file__, side, str(folder), str(folder / run), *arguments]
            subprocess.run(command, check=True, env=environment)
            runs[run] = {**read_json(folder / run / "run.json")}
            runs[run]["mb_per_s"] = round(size_bytes / 1e6 / runs[run]["wall_s"], 2)
            documents[run] = np.sort(np.fromiter(document_hashes(folder / run), np.uint64))
        same = {run: bool(np.array_equal(documents["ours"], hashes)) for run, hashes in documents.items()}
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "cores": len(os.sched_getaffinity(0)),
        "processor": processor(),
        "corpus_bytes": size_bytes,
        "documents": len(documents["ours"]),
        "runs": runs,
        "documents_equal_to_ours": same,
        "times_trl": round(runs["trl"]["wall_s"] / runs["ours"]["wall_s"], 2),
        "times_trl_num_proc_2": round(runs["trl_num_proc_2"]["wall_s"] / runs["ours"]["wall_s"], 2),
    }
    write_json(RESULT, result)
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    if not all(same.values()):
        raise SystemExit("the two sides made different rows")


def make_corpus(folder: Path, megabytes: int) -> None:
    """chat.jsonl for TRL, and the same conversations as records.jsonl, which the clean stage writes."""
    from finetune.data.record import Message, make_record

    venv.create(folder / "environment", with_pip=True)
    python = folder / "environment" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "wordfreq==3.1.1"], check=True)
    corpus = folder / "chat.jsonl"
    subprocess.run([python, Path(__file__).with_name("chat_corpus.py"), str(megabytes), str(SEED), corpus], check=True)
    with corpus.open(encoding="utf-8") as lines, (folder / "records.jsonl").open("w", encoding="utf-8") as handle:
        for line in lines:
            messages = tuple(Message(**message) for message in json.loads(line)["messages"])
            record = make_record(source="chat", messages=messages)
            handle.write(json.dumps(record.to_row(), sort_keys=True, ensure_ascii=False) + "\n")


def make_tokenizer(folder: Path) -> None:
    """A BPE of the first of the text, with Llama 3's pattern, and the template that both sides render."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
    from tokenizers.trainers import BpeTrainer

    from finetune.data.vocabulary.tokenizer_files import install_templates
    from finetune.pretokenizer import LLAMA3_PATTERN

    def texts() -> Iterator[str]:
        read_bytes = 0
        with (folder / "chat.jsonl").open("rb") as handle:
            while read_bytes < TRAINED_ON_BYTES and (line := handle.readline()):
                read_bytes += len(line)
                yield from (message["content"] for message in json.loads(line)["messages"])

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = Sequence(
        [Split(Regex(LLAMA3_PATTERN), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[*SPECIAL.values(), *MARKERS],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    target = folder / "tokenizer"
    target.mkdir()
    tokenizer.save(str(target / "tokenizer.json"))
    write_json(target / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **SPECIAL})
    install_templates(TEMPLATE, target)


def ours(folder: Path, out: Path) -> None:
    """What the stages tokenize and split do, without the plots and the data page."""
    from finetune.data.encoding.token_workers import tokenize_file
    from finetune.data.mixing.external_shuffle import WINDOW_ROWS, WINDOW_TOKENS, WindowFile, shuffled
    from finetune.data.mixing.quotas import row_uses
    from finetune.data.mixing.row_index import read_index
    from finetune.data.mixing.split_files import write_packed, write_splits
    from finetune.data.row_groups import read_batches
    from finetune.data_sections import Tokenize

    tokens, rows = out / "tokens.parquet", out / "rows"
    rows.mkdir(parents=True)
    started = time.monotonic()
    params = Tokenize(max_tokens=PACK_TOKENS, over_length="truncate", loss="assistant")
    tokenize_file(folder / "records.jsonl", folder / "tokenizer", tokens, params)
    tokenized = time.monotonic()
    index = read_index(read_batches(tokens), HELD_OUT, HELD_OUT)
    uses = row_uses(index, None)
    with WindowFile(rows, shuffled(index, uses, SEED, WINDOW_ROWS, WINDOW_TOKENS), index) as windows:
        write_splits(tokens, rows, index, uses, windows, mini_train_rows=1)
        write_packed(rows / "packed.parquet", windows, index, uses, PACK_TOKENS, SEED)
    ended = time.monotonic()
    steps = {"tokenize_s": round(tokenized - started, 2), "split_and_pack_s": round(ended - tokenized, 2)}
    report(out, ended - started, steps)


def trl(folder: Path, out: Path, processes: int) -> None:
    """SFTTrainer's own preparation; the model is a few kilobytes, and its making is not timed."""
    from datasets import load_dataset
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer" / "tokenizer.json"), **SPECIAL)
    tokenizer.chat_template = (folder / "tokenizer" / "training_template.jinja").read_text(encoding="utf-8")
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_attention_heads=1, **sizes))
    config = SFTConfig(
        output_dir=str(out / "trainer"),
        assistant_only_loss=True,
        packing=True,
        packing_strategy="bfd",
        max_length=PACK_TOKENS,
        dataset_num_proc=processes or None,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    started = time.monotonic()
    dataset = load_dataset("json", data_files=str(folder / "chat.jsonl"), split="train")
    loaded = time.monotonic()
    trainer = SFTTrainer(model=model, args=config, train_dataset=dataset, processing_class=tokenizer)
    ended = time.monotonic()
    report(out, ended - started, {"load_s": round(loaded - started, 2), "prepare_s": round(ended - loaded, 2)})
    (out / "rows").mkdir()
    trainer.train_dataset.to_parquet(str(out / "rows" / "packed.parquet"))


def report(out: Path, wall_s: float, steps: dict[str, float]) -> None:
    """Write run.json: wall seconds, processor seconds with imports, and the peak resident sets of this process and of
    the largest of its children.
    """
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    used = {
        "processor_s": round(sum(usage.ru_utime + usage.ru_stime for usage in (own, children)), 2),
        "peak_rss_mib": round(own.ru_maxrss / 1024),
        "peak_rss_largest_worker_mib": round(children.ru_maxrss / 1024),
    }
    write_json(out / "run.json", {"wall_s": round(wall_s, 2), **steps, **used})


def document_hashes(run: Path) -> Iterator[int]:
    """A hash of ids and labels for each document: those of the packed rows, and ours of validation and test."""
    for batch in parquet.ParquetFile(run / "rows" / "packed.parquet").iter_batches(64):
        for row in range(batch.num_rows):
            ids, labels, sizes = (array_of(batch, name, row) for name in ("input_ids", "labels", "seq_lengths"))
            ends = np.cumsum(sizes)
            for start, end in zip(ends - sizes, ends, strict=True):
                yield document_hash(ids[start:end], labels[start:end])
    for name in ("validation", "test"):
        path = run / "rows" / f"{name}.parquet"
        for batch in parquet.ParquetFile(path).iter_batches(64) if path.exists() else ():
            for row in range(batch.num_rows):
                ids, trained = array_of(batch, "input_ids", row), array_of(batch, "trained", row)
                labels = np.where(trained, ids, -100)
                labels[0] = -100
                yield document_hash(ids, labels)


def array_of(batch: pa.RecordBatch, column: str, row: int) -> Any:
    """One row's list as a numpy array."""
    return batch.column(column)[row].values.to_numpy(zero_copy_only=False)


def document_hash(ids: Any, labels: Any) -> int:
    """The first 8 bytes of BLAKE2b over ids and labels as 64-bit integers."""
    content = ids.astype(np.int64).tobytes() + labels.astype(np.int64).tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def processor() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    if sys.argv[1:2] == ["ours"]:
        ours(Path(sys.argv[2]), Path(sys.argv[3]))
    elif sys.argv[1:2] == ["trl"]:
        trl(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
