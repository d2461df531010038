"""What stage 1 left, as one numbered sequence: candidates of all shards, in reading order.

Columns that every candidate is compared by are read whole; texts and tokens stay on disk, mapped.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cdpvae.files import map_table
from cdpvae.preprocessing.stages.shards import stem_of


class Candidates:
    """Candidates 0 .. len-1 of the shards appended, which come in reading order.

    shards: their directories and summaries (`prepare.Preparer`).
    """

    def __init__(self) -> None:
        self.shards: list[tuple[Path, dict[str, Any]]] = []
        self._tables: list[pa.Table] = []
        self._starts = [0]

    def __len__(self) -> int:
        return self._starts[-1]

    def append(self, directory: Path, summary: dict[str, Any]) -> None:
        """One more shard."""
        path = directory / f"{stem_of(summary['source'], summary['start'])}.arrow"
        if not path.exists():
            raise ValueError(
                f"{path} is missing, which a worker has written: processed_dir must be on a file "
                "system that all nodes of the cluster share"
            )
        self._tables.append(map_table(path))
        self._starts.append(self._starts[-1] + summary["candidates"])
        self.shards.append((directory, summary))

    def drop_shards_from(self, count: int) -> None:
        """Drop the shards that hold none of the first `count` candidates."""
        while len(self.shards) > 1 and self._starts[-2] >= count:
            self.pop()

    def pop(self) -> dict[str, Any]:
        """Drop the last shard -> its summary."""
        self._tables.pop()
        self._starts.pop()
        return self.shards.pop()[1]

    @property
    def summaries(self) -> list[dict[str, Any]]:
        return [summary for _, summary in self.shards]

    def column(self, name: str, count: int | None = None) -> np.ndarray:
        """A numeric column of the first `count` candidates, copied."""
        parts = [table.column(name).to_numpy() for table in self._tables]
        return np.concatenate(parts)[:count] if parts else np.zeros(0, np.int64)

    def keys(self, count: int | None = None) -> np.ndarray:
        """(count,) the 16 bytes of the exact key each, as numpy's V16."""
        parts = [
            np.frombuffer(chunk.buffers()[1], "V16")[chunk.offset : chunk.offset + len(chunk)]
            for table in self._tables
            for chunk in table.column("key").chunks
        ]
        return np.concatenate(parts)[:count] if parts else np.zeros(0, "V16")

    def matrix(self, name: str, count: int | None = None) -> np.ndarray:
        """A column of fixed-size lists as (count, size)."""
        parts = []
        for table in self._tables:
            for chunk in table.column(name).chunks:
                values = chunk.flatten().to_numpy(zero_copy_only=True)
                parts.append(values.reshape(len(chunk), -1))
        return np.concatenate(parts)[:count]

    def list_lengths(self, name: str) -> np.ndarray:
        """(len,) lengths of a column of lists."""
        parts = [pc.list_value_length(table.column(name)).to_numpy() for table in self._tables]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def strings(self, name: str) -> np.ndarray:
        """(len,) a text column with few values, as objects; None where there is none."""
        parts = [np.array(table.column(name).to_pylist(), object) for table in self._tables]
        return np.concatenate(parts) if parts else np.zeros(0, object)

    def sources(self) -> np.ndarray:
        """(len,) number of the input each candidate comes from."""
        numbers = [summary["source"] for summary in self.summaries]
        return np.repeat(np.array(numbers, np.int64), np.diff(self._starts))

    def record_ids(self) -> np.ndarray:
        """(len,) number of each candidate's raw record among those of all inputs, from 0."""
        base = np.zeros(1 + max((s["source"] for s in self.summaries), default=0), np.int64)
        total, last = 0, -1
        for summary in self.summaries:
            if summary["source"] != last:
                last = summary["source"]
                base[last] = total
            total += summary["counts"]["read"]
        return base[self.sources()] + self.column("position")

    def text(self, index: int) -> str:
        """The text of candidate `index` that is compared."""
        table, row = self._at(index)
        return f"{table['instruction'][row].as_py()}\n{table['response'][row].as_py()}"

    def take(self, indices: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """Rows `indices` (ascending) of some columns, as one table."""
        parts = []
        for table, first, end in zip(self._tables, self._starts, self._starts[1:], strict=False):
            low, high = np.searchsorted(indices, [first, end])
            if high > low:
                parts.append(table.select(columns).take(pa.array(indices[low:high] - first)))
        return pa.concat_tables(parts)

    def _at(self, index: int) -> tuple[pa.Table, int]:
        shard = bisect_right(self._starts, index) - 1
        return self._tables[shard], index - self._starts[shard]
