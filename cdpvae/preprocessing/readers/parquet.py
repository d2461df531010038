"""Parquet: rows to records, with a batch of them in memory at a time.

The footer says how many rows a row group has. A group that is damaged gives a problem for each of
its rows from the damage on, so that row numbers hold, and the groups after it are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cdpvae.preprocessing.readers.record import NOT_UTF8, RawRecord, Unreadable

BATCH_ROWS = 256
DAMAGED_GROUP = "row is in a damaged part of the file"
# Bytes of a column held while its row group is read.
BUFFER = 2**20


def read_parquet(path: Path, start: int = 0) -> Iterator[RawRecord]:
    """Rows from number `start` on, counted from 0; row groups before it are not read.

    Raises Unreadable when the file is no Parquet file or its footer is damaged.
    """
    try:
        file = pq.ParquetFile(
            path, buffer_size=BUFFER, pre_buffer=False, page_checksum_verification=True
        )
    except (pa.ArrowException, OSError) as error:
        raise Unreadable(f"is no whole Parquet file: {error}") from None
    with file:
        first = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if start < first + rows:
                for row in _read_group(file, group, rows, max(0, start - first)):
                    yield RawRecord(first + row.position, row.value, row.problem, row.detail)
            first += rows


def _read_group(file: pq.ParquetFile, group: int, rows: int, start: int) -> Iterator[RawRecord]:
    """Rows of one group; the position is that in the group, from 1."""
    done = 0
    try:
        for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], use_threads=False):
            skip = min(max(0, start - done), batch.num_rows)
            yield from _rows(batch.slice(skip), done + skip)
            done += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        for position in range(max(done, start), rows):
            yield RawRecord(position + 1, problem=DAMAGED_GROUP, detail=str(error))


def _rows(batch: pa.RecordBatch, before: int) -> Iterator[RawRecord]:
    try:
        values: list[Any] = batch.to_pylist()
    except UnicodeDecodeError:
        for number in range(batch.num_rows):
            yield _row(batch.slice(number, 1), before + number + 1)
        return
    for position, value in enumerate(values, start=before + 1):
        yield RawRecord(position, value)


def _row(batch: pa.RecordBatch, position: int) -> RawRecord:
    try:
        return RawRecord(position, batch.to_pylist()[0])
    except UnicodeDecodeError as error:
        return RawRecord(position, problem=NOT_UTF8, detail=str(error))
