import pyarrow as pa
import pytest
from pyarrow import parquet

from finetune.data import row_groups
from finetune.data.row_groups import read_batches, row_group_writer
from finetune.errors import DataError

SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32()))])


def batch(lengths):
    return pa.RecordBatch.from_pylist([{"input_ids": [length] * length} for length in lengths], schema=SCHEMA)


def group_rows(path):
    metadata = parquet.ParquetFile(path).metadata
    return [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]


@pytest.mark.parametrize("batch_rows", [1, 3, 4, 11])
def test_the_bounds_of_row_groups_do_not_depend_on_how_the_rows_come(tmp_path, monkeypatch, batch_rows):
    monkeypatch.setattr(row_groups, "ROW_GROUP_ROWS", 4)
    target = tmp_path / "x.parquet"
    with row_group_writer(target, SCHEMA) as writer:
        for start in range(0, 11, batch_rows):
            writer.add(batch(range(start, min(start + batch_rows, 11))))
    assert group_rows(target) == [4, 4, 3]
    assert [len(row["input_ids"]) for part in read_batches(target) for row in part.to_pylist()] == list(range(11))


@pytest.mark.parametrize("batch_rows", [1, 2, 6])
def test_long_documents_end_a_row_group_early(tmp_path, monkeypatch, batch_rows):
    monkeypatch.setattr(row_groups, "ROW_GROUP_TOKENS", 10)
    target = tmp_path / "x.parquet"
    lengths = [4, 4, 2, 20, 1, 1]
    with row_group_writer(target, SCHEMA) as writer:
        for start in range(0, 6, batch_rows):
            writer.add(batch(lengths[start : start + batch_rows]))
    assert group_rows(target) == [3, 1, 2]


def test_a_file_that_fails_is_not_left_behind(tmp_path):
    other = pa.RecordBatch.from_pylist([{"input_ids": [1], "more": 1}])
    with pytest.raises(ValueError, match="schema"), row_group_writer(tmp_path / "x.parquet", SCHEMA) as writer:
        writer.write([other])
    assert list(tmp_path.iterdir()) == []


def test_a_missing_and_a_damaged_file_are_errors(tmp_path):
    with pytest.raises(DataError, match="file is missing"):
        next(read_batches(tmp_path / "absent.parquet"))
    (tmp_path / "x.parquet").write_bytes(b"no Parquet")
    with pytest.raises(DataError, match="not a Parquet file"):
        next(read_batches(tmp_path / "x.parquet"))
