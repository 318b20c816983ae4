import os

import pytest

from finetune.data.fetching.sources import RawFile, copy_verified, local_files, verified_files
from finetune.errors import DataError
from finetune.io import write_json

SHA256_OF_ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_files_that_match_come_sorted(tmp_path):
    for name in ("b.csv", "a.csv", "deep/c.csv", "d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = local_files(tmp_path, "**/*.csv", "s")
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a.csv", "b.csv", "deep/c.csv"]


def test_a_missing_an_empty_and_an_escaping_file_are_errors_with_a_remedy(tmp_path):
    with pytest.raises(DataError, match=r"no file matches 'x\.csv' below .*\n  where:  fetch\.sources, tweets\n"):
        local_files(tmp_path, "x.csv", "tweets")
    (tmp_path / "x.csv").write_bytes(b"")
    with pytest.raises(DataError, match=r"file is empty\n  where:  .*x\.csv\n  remedy: give source tweets a file"):
        local_files(tmp_path, "x.csv", "tweets")
    for pattern in ("../*.csv", "/etc/*"):
        with pytest.raises(DataError, match="leaves"):
            local_files(tmp_path, pattern, "tweets")


def test_a_name_that_is_not_utf8_is_an_error_that_spells_it(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.csv")).write_text("x")
    with pytest.raises(DataError, match=r"the name of the file is not UTF-8\n  where:  caf\\xe9\.csv\n") as caught:
        local_files(tmp_path, "*.csv", "s")
    assert "rename the file" in str(caught.value).encode("utf-8").decode("utf-8")


def test_a_copy_is_listed_with_hash_and_size_and_a_later_change_is_found(tmp_path):
    (tmp_path / "in.txt").write_bytes(b"abc")
    raw = tmp_path / "raw"
    file = copy_verified(tmp_path / "in.txt", raw, "s/in.txt")
    assert file == RawFile("s/in.txt", SHA256_OF_ABC, 3)
    write_json(raw / "manifest.json", {"sources": [{"name": "s", "files": [file.to_row()]}]})
    assert [file.path for file in verified_files(raw, "s")] == ["s/in.txt"]
    with pytest.raises(DataError, match="source t is not in the manifest"):
        verified_files(raw, "t")
    (raw / "s/in.txt").write_bytes(b"abd")
    with pytest.raises(DataError, match=f"file has 3 bytes and SHA-256 .*, expected 3 and {SHA256_OF_ABC}"):
        verified_files(raw, "s")
    (raw / "s/in.txt").unlink()
    with pytest.raises(DataError, match="file is missing"):
        verified_files(raw, "s")
