"""Workers' shards change no byte of clean and tokenize, whatever their number, order or state."""

import json
import re
import shutil
from pathlib import Path

import pytest
from clean_runs import ROOT, SMOKE

from finetune import shard as program
from finetune.data import shards
from finetune.data.cleaning import chunk_jobs
from finetune.data.encoding import tokenizing
from finetune.data.reading import lines
from finetune.data.shards import SHARDS, Shard, parse_shard, store_of
from finetune.errors import DataError
from finetune.io import sha256_tree
from finetune.stages import clean, fetch, tokenize, tokenizer

SHARES = {"validation_share": SMOKE.split.validation_share, "test_share": SMOKE.split.test_share}
OUTS = {
    "clean": ("data/clean", "metrics/clean.json", "plots/funnel.csv", "plots/sources.csv"),
    "tokenize": ("data/tokens", "metrics/tokenize.json", "plots/lengths.csv"),
}
TOLD = re.compile(r"(\d+) of (\d+) pieces taken .* made here: (\d+), of which (\d+) were damaged .* versions: (\d+)$")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """The sample's few hundred kilobytes as many pieces, done in this process."""
    monkeypatch.setattr(lines, "CHUNK_BYTES", 8_000)
    monkeypatch.setattr(chunk_jobs, "JOB_BYTES", 20_000)
    monkeypatch.setattr(chunk_jobs, "PART_BYTES", 3_000)
    monkeypatch.setattr(tokenizing, "RANGE_BYTES", 10_000)
    monkeypatch.setenv("FINETUNE_WORKERS", "1")


def run_stage(stage):
    outs = map(Path, OUTS[stage])
    if stage == "clean":
        clean.run(Path("data/raw"), *outs, fetch=SMOKE.fetch, clean=SMOKE.clean, **SHARES)
    else:
        tokenize.run(Path("data/clean"), Path("models/tokenizer"), *outs, tokenize=SMOKE.tokenize)
    return {name: sha256_tree(Path(name)) for name in OUTS[stage]}


@pytest.fixture(scope="module")
def unsharded(tmp_path_factory):
    """The sample after fetch, clean, tokenizer and tokenize, and the hashes of what the two stages made."""
    folder = tmp_path_factory.mktemp("unsharded")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        sample = SMOKE.fetch.model_copy(update={"local_dir": str(ROOT / SMOKE.fetch.local_dir)})
        fetch.run(Path("data/raw"), Path("data/base.json"), Path("metrics/fetch.json"), fetch=sample)
        made = run_stage("clean")
        own = SMOKE.tokenizer.model_copy(update={"chat_template": str(ROOT / SMOKE.tokenizer.chat_template)})
        pack = {"pack_tokens": SMOKE.split.pack_tokens}
        outs = (Path("models/tokenizer"), Path("metrics/tokenizer.json"))
        tokenizer.run(Path("data/clean"), Path("data/base.json"), *outs, tokenizer=own, **pack, **SHARES)
        made |= run_stage("tokenize")
    return folder, made


@pytest.fixture
def repository(unsharded, tmp_path, monkeypatch):
    """A folder with the stages' inputs, dvc.yaml and params.yaml, and no shards."""
    folder = tmp_path / "repository"
    shutil.copytree(unsharded[0], folder)
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, folder)
    shutil.copy(ROOT / "recipes/smoke/params.yaml", folder)
    monkeypatch.chdir(folder)
    return folder


def work(stage, *numbers):
    for number in numbers:
        assert program.main([stage, "--shard", number]) == 0


def told(caplog):
    """Of the stage's line: taken, of how many, made here, of which damaged, and how many were other work's."""
    (line,) = [found for found in map(TOLD.search, caplog.messages) if found]
    return tuple(int(number) for number in line.groups())


@pytest.fixture
def caplog(caplog, monkeypatch):
    monkeypatch.setattr(program, "setup_logging", lambda _: None)
    monkeypatch.setattr(program.logger, "propagate", True)
    caplog.set_level("INFO", logger="finetune")
    return caplog


@pytest.mark.parametrize("stage", ["clean", "tokenize"])
@pytest.mark.parametrize("numbers", [["1/1"], ["2/2", "1/2"], ["4/5", "1/5", "5/5", "3/5", "2/5"]])
def test_shards_in_any_number_and_order_change_no_byte(unsharded, repository, caplog, stage, numbers):
    work(stage, *numbers)
    hashes = run_stage(stage)
    assert hashes == {name: unsharded[1][name] for name in OUTS[stage]}
    taken, pieces, made, damaged, others = told(caplog)
    assert (taken, made, damaged, others) == (pieces, 0, 0, 0)
    assert pieces >= 15
    made_by = [int(re.search(r": (\d+) piece", line)[1]) for line in caplog.messages if line.startswith("shard ")]
    assert sum(made_by) == pieces
    assert min(made_by) > 0


@pytest.mark.parametrize("stage", ["clean", "tokenize"])
def test_a_damaged_and_a_missing_shard_are_done_by_the_stage(unsharded, repository, caplog, stage):
    work(stage, "1/1")
    folders = sorted((SHARDS / stage).iterdir())
    flipped = max(folders[0].iterdir(), key=lambda path: path.stat().st_size * (path.name != shards.MANIFEST))
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    (folders[1] / shards.MANIFEST).write_text("{", encoding="utf-8")
    (folders[2] / "one_more").touch()
    shutil.rmtree(folders[3])
    hashes = run_stage(stage)
    assert hashes == {name: unsharded[1][name] for name in OUTS[stage]}
    taken, pieces, made, damaged, others = told(caplog)
    assert (taken, made, damaged, others) == (pieces - 4, 4, 3, 0)


@pytest.mark.parametrize("stage", ["clean", "tokenize"])
def test_shards_of_other_parameters_code_or_versions_are_not_taken(unsharded, repository, caplog, monkeypatch, stage):
    params = Path("params.yaml").read_text(encoding="utf-8")
    key = {"clean": "min_answer_characters: ", "tokenize": "max_tokens: "}[stage]
    Path("params.yaml").write_text(re.sub(f"{key}\\d+", f"{key}64", params), encoding="utf-8")
    work(stage, "1/2")
    Path("params.yaml").write_text(params, encoding="utf-8")
    with monkeypatch.context() as other_code:
        other_code.setattr(shards, "code_hash", lambda: "other")
        work(stage, "1/2")
    with monkeypatch.context() as other_version:
        other_version.setattr(shards, "version", lambda name: "0")
        work(stage, "1/2")
    work(stage, "2/2")
    mine = int(re.search(r": (\d+) piece", caplog.messages[-1])[1])
    hashes = run_stage(stage)
    assert hashes == {name: unsharded[1][name] for name in OUTS[stage]}
    taken, pieces, made, damaged, others = told(caplog)
    assert (taken, made, damaged, others) == (mine, pieces - mine, 0, 3 * (pieces - mine))
    assert 0 < mine < pieces


def test_a_shard_of_another_input_is_not_taken(unsharded, repository, caplog):
    work("clean", "1/1")
    before = len(list((SHARDS / "clean").iterdir()))
    manifest = Path("data/raw/manifest.json")
    content = json.loads(manifest.read_text(encoding="utf-8"))
    entry = next(entry for entry in content["sources"] if entry["name"] == "chat_en")
    changed = Path("data/raw", entry["files"][0]["path"])
    changed.write_bytes(changed.read_bytes() + b"\n")
    entry["files"][0] |= {"sha256": sha256_tree(changed), "size_bytes": changed.stat().st_size}
    manifest.write_text(json.dumps(content), encoding="utf-8")
    run_stage("clean")
    taken, pieces, made, damaged, others = told(caplog)
    assert 0 < made < pieces
    assert (taken, damaged, others) == (pieces - made, 0, before - taken)


def test_what_is_there_is_not_made_again_and_a_damaged_piece_is(repository, caplog):
    work("tokenize", "1/2", "1/2")
    made, again = caplog.messages[-2:]
    count = int(re.search(r": (\d+) piece", made)[1])
    assert count > 0
    assert f"0 piece(s) made, {count} there already" in again
    folder = next((SHARDS / "tokenize").iterdir())
    (folder / "rows.arrow").write_bytes(b"")
    work("tokenize", "1/2")
    assert f"1 piece(s) made, {count - 1} there already" in caplog.messages[-1]
    assert store_of("x", {}).common != store_of("y", {}).common


def test_only_the_files_of_a_shard_are_read(repository):
    names = [path for path in Path("data/raw").rglob("*") if path.is_file() and path.name != "manifest.json"]
    manifest = json.loads(Path("data/raw/manifest.json").read_text(encoding="utf-8"))
    first = Path("data/raw", manifest["sources"][0]["files"][0]["path"])
    for path in names:
        if path != first:
            path.unlink()
    count = 200
    with pytest.raises(DataError, match="file is missing"):
        chunk_jobs.jobs_of_shard(Path("data/raw"), SMOKE.fetch.sources, Shard(count, count))
    assert chunk_jobs.jobs_of_shard(Path("data/raw"), SMOKE.fetch.sources, Shard(1, count))[0].chunk.start == 0


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_each_chunk_is_of_one_shard(repository, count):
    sources = SMOKE.fetch.sources
    whole = [(job.chunk.file, job.chunk.start) for job in chunk_jobs.jobs(Path("data/raw"), sources)]
    found = [
        (job.chunk.file, job.chunk.start)
        for number in range(1, count + 1)
        for job in chunk_jobs.jobs_of_shard(Path("data/raw"), sources, Shard(number, count))
    ]
    assert found == whole


@pytest.mark.parametrize("text", ["0/4", "5/4", "3", "a/b", "-1/4", "1/0", ""])
def test_no_shard_is_refused(text):
    with pytest.raises(DataError, match="is no shard"):
        parse_shard(text)


def test_a_worker_in_another_folder_is_told(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "recipes/smoke/params.yaml", tmp_path)
    assert program.main(["clean", "--shard", "1/1"]) == 1
    assert "change to the root of the repository" in caplog.messages[-1]


def test_the_versions_in_a_key_are_the_pins_of_the_data_stages():
    pins = (ROOT / "requirements/data.txt").read_text(encoding="utf-8").splitlines()
    assert sorted(shards.LIBRARIES) == sorted(line.partition("==")[0] for line in pins if "==" in line)
