"""Parquet: rows to records, with a batch of them in memory at a time.

The footer says how many rows a row group has. A damaged group gives a problem for each of its rows
from the damage on, so that row numbers hold, and the groups after it are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cdpvae.preprocessing.readers.problems import NOT_UTF8, Unreadable
from cdpvae.preprocessing.records import RawRecord

BATCH_ROWS = 256
DAMAGED_GROUP = "row is in a damaged part of the file"
# Bytes of a column held while its row group is read.
BUFFER = 2**20


def read_parquet(path: Path, start: int = 0) -> Iterator[RawRecord]:
    """Read rows from number `start` on, counted from 0; earlier row groups are not touched.

    Raises Unreadable when the file is no Parquet file or its footer is damaged.
    """
    try:
        file = pq.ParquetFile(
            path, buffer_size=BUFFER, pre_buffer=False, page_checksum_verification=True
        )
    except (pa.ArrowException, OSError) as error:
        raise Unreadable(f"is no whole Parquet file: {error}") from None
    # Row groups that lie before `start` are skipped without being read.
    with file:
        first = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if start < first + rows:
                yield from _read_group(file, group, rows, max(0, start - first))
            first += rows


def _read_group(file: pq.ParquetFile, group: int, rows: int, start: int) -> Iterator[RawRecord]:
    """Read one row group, from its row `start` on.

    file: the open file.
    group: number of the row group.
    rows: rows that the footer promises for it.
    start: first row wanted, counted from 0 within the group.
    """
    done = 0
    try:
        for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], use_threads=False):
            skip = min(max(0, start - done), batch.num_rows)
            yield from _batch_records(batch.slice(skip))
            done += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        # Every row that is lost has its problem, so that later rows keep their numbers.
        for _ in range(max(done, start), rows):
            yield RawRecord(problem=DAMAGED_GROUP, detail=str(error))


def _batch_records(batch: pa.RecordBatch) -> Iterator[RawRecord]:
    """Convert a batch at once, or row by row when a text in it is not UTF-8."""
    try:
        values: list[Any] = batch.to_pylist()
    except UnicodeDecodeError:
        for number in range(batch.num_rows):
            yield _row_record(batch.slice(number, 1))
        return
    for value in values:
        yield RawRecord(value)


def _row_record(row: pa.RecordBatch) -> RawRecord:
    """Convert a batch of one row to its record, or to the problem that it is not UTF-8."""
    try:
        return RawRecord(row.to_pylist()[0])
    except UnicodeDecodeError as error:
        return RawRecord(problem=NOT_UTF8, detail=str(error))
