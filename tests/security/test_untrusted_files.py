"""Files of anybody: names that lead elsewhere, links, bombs, YAML with tags, and text that would command a terminal."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from clean_runs import source_of
from hub_server import State, fetch, serving, source

from finetune.data.fetching.sources import local_files
from finetune.errors import DataError, ParamsError
from finetune.log import logger, printable, setup_logging
from finetune.params import load_params

ROOT = Path(__file__).parents[2]
MIB, BOMB_MIB = 1 << 20, 256
ESCAPE = "\x1b]0;owned\x07\x1b[2J"
LINE = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src")}


@pytest.fixture
def hub() -> Iterator[State]:
    yield from serving({"datasets/team/data": {"data/a.jsonl": LINE}})


@pytest.mark.parametrize("name", ["../outside.jsonl", "data/../../outside.jsonl", "/tmp/outside.jsonl"])  # noqa: S108
def test_a_hub_file_that_would_lie_elsewhere_is_refused_before_any_download(
    hub: State, tmp_path: Path, name: str
) -> None:
    hub.repos["datasets/team/data"][name] = LINE
    done = fetch(hub, tmp_path / "work", source(files="*"))
    assert done.returncode == 1
    assert f"the Hub lists a file {name!r} outside the repository" in done.stderr
    assert not [request for request in hub.requests if request.sent_bytes]
    assert list(tmp_path.rglob("outside.jsonl")) == []


def test_names_on_the_hub_do_not_command_the_terminal(hub: State, tmp_path: Path) -> None:
    hub.repos["datasets/team/data"][f"data/{ESCAPE}.txt"] = LINE
    done = fetch(hub, tmp_path, source(files="*.parquet"))
    assert done.returncode == 1
    assert "no file matches '*.parquet'; it has: " in done.stderr
    # The test's own program prints the error as it is; a stage logs it.
    assert "\x1b" not in printable(done.stderr)


def test_what_a_terminal_would_obey_is_spelled_out_in_every_log_line(capfd: pytest.CaptureFixture[str]) -> None:
    before = logger.handlers, logger.propagate, logger.level
    try:
        setup_logging("clean")
        logger.error("row %s: %s", 7, f"{ESCAPE}\u202egnp.exe\r\tend")
    finally:
        logger.handlers, logger.propagate = before[:2]
        logger.setLevel(before[2])
    assert capfd.readouterr().err == "clean: row 7: \\x1b]0;owned\\x07\\x1b[2J\\u202egnp.exe\\r\tend\n"


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    private, local = tmp_path / "private.jsonl", tmp_path / "data"
    private.write_bytes(LINE)
    local.mkdir()
    (local / "a.jsonl").symlink_to(private)
    with pytest.raises(DataError, match=r"a link leads out of .*data, to .*private\.jsonl\n  where:  .*a\.jsonl"):
        local_files(local, "*.jsonl", "s")
    (local / "a.jsonl").unlink()
    (local / "all").symlink_to(tmp_path)
    with pytest.raises(DataError, match="a link leads out of"):
        local_files(local, "all/*.jsonl", "s")


def test_links_inside_the_folder_and_into_dvcs_cache_are_followed(tmp_path: Path) -> None:
    local, cached = tmp_path / "data", tmp_path / "cache/files/md5/ab" / ("c" * 30)
    for file in (local / "whole.jsonl", cached):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(LINE)
    (local / "a.jsonl").symlink_to(local / "whole.jsonl")
    (local / "b.jsonl").symlink_to(cached)
    assert [path.name for path in local_files(local, "*.jsonl", "s")] == ["a.jsonl", "b.jsonl", "whole.jsonl"]
    (tmp_path / "linked").symlink_to(local)
    assert len(local_files(tmp_path / "linked", "*.jsonl", "s")) == 3


READ = """
import resource, sys
from pathlib import Path
from finetune.data.reading.formats import parse_chunk
from finetune.data.reading.containers import chunks
from finetune.source_sections import Source
source = Source.model_validate_json(sys.argv[2])
before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for chunk in chunks(Path(sys.argv[1]), "s.jsonl.gz", source):
    for row in parse_chunk(Path(sys.argv[1]), chunk, source):
        print(getattr(row, "reason", "record"))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) // 1024)
"""


@pytest.mark.parametrize("begins", [b'{"messages": "', b" "])
def test_a_compressed_bomb_takes_bounded_memory_and_costs_its_own_line_only(tmp_path: Path, begins: bytes) -> None:
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as file:
        file.write(LINE + begins)
        for _ in range(BOMB_MIB):
            file.write(b" " * MIB)
        file.write(b'"}\n' + LINE)
    (tmp_path / "s.jsonl.gz").write_bytes(packed.getvalue())
    assert len(packed.getvalue()) < BOMB_MIB * MIB / 900
    described = source_of("s", origin={"kind": "local", "files": "s.jsonl.gz"}).model_dump_json()
    command = [sys.executable, "-c", READ, str(tmp_path), described]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
    *rows, grown_mib = done.stdout.split()
    assert rows == ["record", "line_too_long", "record"]
    assert int(grown_mib) < 100


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system ['touch OWNED']", "!!python/name:os.system", "!evil x"]
)
def test_a_tag_in_params_yaml_is_refused_and_runs_nothing(
    tag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "recipes/smoke/params.yaml").read_text(encoding="utf-8")
    Path("params.yaml").write_text(text.replace("recipe: smoke", f"recipe: {tag}"), encoding="utf-8")
    with pytest.raises(ParamsError):
        load_params(Path("params.yaml"))
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]
