"""Token rows and packed rows -> Parquet files of fixed columns, the same bytes for the same rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from finetune.io import replacing

TOKENS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("language", pa.string()),
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("trained", pa.list_(pa.bool_()), nullable=False),
    ]
)
PACKED = pa.schema(
    [
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("labels", pa.list_(pa.int32()), nullable=False),
        pa.field("seq_lengths", pa.list_(pa.int32()), nullable=False),
    ]
)
ROW_GROUP_ROWS = 10_000


def write_parquet(target: Path, rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Replace `target` by the rows; the row groups are of fixed size, so the bytes do not depend on memory."""
    table = pa.Table.from_pylist(list(rows), schema=schema)
    with replacing(target) as temporary:
        parquet.write_table(table, temporary, compression="zstd", row_group_size=ROW_GROUP_ROWS)
