"""Writing processed rows: streamed to disk, then saved in the layout of `datasets`.

Rows go to one Arrow stream per split as they come, so that memory does not grow with the data.
The fingerprint that `datasets` stores is ours, as its own depends on the time of writing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow as pa
from datasets.table import MemoryMappedTable

from cdpvae.data.filters import Record

BATCH_ROWS = 1000
ARROW_SCHEMA = pa.schema(
    {
        "record_id": pa.int64(),
        "source": pa.string(),
        "instruction": pa.string(),
        "response": pa.string(),
        "instruction_ids": pa.list_(pa.int32()),
        "response_ids": pa.list_(pa.int32()),
    }
)


class SplitWriter:
    """A context manager: `add` rows, then `finish` once. The streams are removed at the end."""

    def __init__(self, directory: Path, splits: Sequence[str]) -> None:
        self._directory = directory
        self._waiting: dict[str, list[Record]] = {split: [] for split in splits}
        self._rows = dict.fromkeys(splits, 0)
        self._streams = {split: directory / f"{split}.stream" for split in splits}

    def __enter__(self) -> SplitWriter:
        self._writers = {
            split: pa.ipc.new_stream(str(path), ARROW_SCHEMA)
            for split, path in self._streams.items()
        }
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self._writers.values():
            writer.close()
        for path in self._streams.values():
            path.unlink(missing_ok=True)

    def add(self, split: str, record: Record) -> None:
        """Append one row to a split."""
        self._waiting[split].append(record)
        self._rows[split] += 1
        if len(self._waiting[split]) == BATCH_ROWS:
            self._flush(split)

    def finish(self, fingerprint: str) -> None:
        """Save every split that has rows as `directory/split`.

        fingerprint: 16 hex digits that identify inputs and settings.
        """
        bars = datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            for split, stream in self._streams.items():
                self._flush(split)
                self._writers[split].close()
                if self._rows[split]:
                    table = MemoryMappedTable.from_file(str(stream))
                    rows = datasets.Dataset(table, fingerprint=f"{fingerprint}-{split}")
                    rows.save_to_disk(str(self._directory / split))
        finally:
            if not bars:
                datasets.enable_progress_bars()

    def _flush(self, split: str) -> None:
        records, self._waiting[split] = self._waiting[split], []
        if records:
            columns = [
                pa.array([getattr(record, field.name) for record in records], type=field.type)
                for field in ARROW_SCHEMA
            ]
            batch = pa.RecordBatch.from_arrays(columns, schema=ARROW_SCHEMA)
            self._writers[split].write_batch(batch)
