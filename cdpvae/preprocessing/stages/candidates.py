"""The records that the first stage leaves: candidates of all shards, in reading order.

Columns that are needed of every candidate are read whole; texts and tokens stay on disk, mapped.
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
from cdpvae.preprocessing.records import compared_text
from cdpvae.preprocessing.stages.shards import stem_of


class Candidates:
    """The candidates 0 .. len-1 of the shards appended so far, which come in reading order.

    shards: directory and summary (`prepare_shard.ShardPreparer`) of each shard.
    """

    def __init__(self) -> None:
        self.shards: list[tuple[Path, dict[str, Any]]] = []
        self._tables: list[pa.Table] = []
        self._starts = [0]

    def __len__(self) -> int:
        return self._starts[-1]

    def append(self, directory: Path, summary: dict[str, Any]) -> None:
        """Append the candidates of one more shard. Raises ValueError when its file is missing."""
        path = directory / f"{stem_of(summary['source'], summary['start'])}.arrow"
        if not path.exists():
            raise ValueError(
                f"{path} is missing, which a worker has written: processed_dir must be on a file "
                "system that all nodes of the cluster share"
            )
        # Only the columns that are asked for are read from the disk.
        self._tables.append(map_table(path))
        self._starts.append(self._starts[-1] + summary["candidates"])
        self.shards.append((directory, summary))

    def drop_shards_from(self, count: int) -> None:
        """Drop the shards that hold none of the first `count` candidates."""
        while len(self.shards) > 1 and self._starts[-2] >= count:
            self.pop()

    def pop(self) -> dict[str, Any]:
        """Drop the last shard and return its summary."""
        self._tables.pop()
        self._starts.pop()
        return self.shards.pop()[1]

    @property
    def summaries(self) -> list[dict[str, Any]]:
        """The summaries of all shards, in order."""
        return [summary for _, summary in self.shards]

    def column(self, name: str, count: int | None = None) -> np.ndarray:
        """Copy a numeric column of the first `count` candidates, (count,)."""
        parts = [table.column(name).to_numpy() for table in self._tables]
        return np.concatenate(parts)[:count] if parts else np.zeros(0, np.int64)

    def keys(self, count: int | None = None) -> np.ndarray:
        """Return the exact keys of the first `count` candidates, (count,) of 16 bytes (V16)."""
        parts = [
            np.frombuffer(chunk.buffers()[1], "V16")[chunk.offset : chunk.offset + len(chunk)]
            for table in self._tables
            for chunk in table.column("key").chunks
        ]
        return np.concatenate(parts)[:count] if parts else np.zeros(0, "V16")

    def matrix(self, name: str, count: int | None = None) -> np.ndarray:
        """Return a column of fixed-size lists of the first `count` candidates, (count, size)."""
        parts = []
        for table in self._tables:
            for chunk in table.column(name).chunks:
                values = chunk.flatten().to_numpy(zero_copy_only=True)
                parts.append(values.reshape(len(chunk), -1))
        return np.concatenate(parts)[:count]

    def list_lengths(self, name: str) -> np.ndarray:
        """Return the lengths of a column of lists, (len,)."""
        parts = [pc.list_value_length(table.column(name)).to_numpy() for table in self._tables]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def strings(self, name: str) -> np.ndarray:
        """Return a text column as objects, (len,); a missing text is None."""
        parts = [np.array(table.column(name).to_pylist(), object) for table in self._tables]
        return np.concatenate(parts) if parts else np.zeros(0, object)

    def sources(self) -> np.ndarray:
        """Return the number of the input that each candidate comes from, (len,)."""
        numbers = [summary["source"] for summary in self.summaries]
        return np.repeat(np.array(numbers, np.int64), np.diff(self._starts))

    def count_before(self, source: int, count: int | None = None) -> int:
        """Count those of the first `count` candidates whose inputs come before number `source`."""
        return int(np.searchsorted(self.sources()[:count], source))

    def record_ids(self) -> np.ndarray:
        """Return the number of each candidate's raw record over all inputs, from 0, (len,)."""
        # An input's first id is the number of records read from the inputs before it.
        first_id = np.zeros(1 + max((s["source"] for s in self.summaries), default=0), np.int64)
        total, last = 0, -1
        for summary in self.summaries:
            if summary["source"] != last:
                last = summary["source"]
                first_id[last] = total
            total += summary["counts"]["read"]
        return first_id[self.sources()] + self.column("record_number")

    def place(self, index: int) -> dict[str, int | None]:
        """Return `record_number` and `line` of one candidate within its input."""
        table, row = self._at(index)
        return {name: table[name][row].as_py() for name in ("record_number", "line")}

    def text(self, index: int) -> str:
        """Return the text of one candidate that is compared."""
        table, row = self._at(index)
        return compared_text(table["instruction"][row].as_py(), table["response"][row].as_py())

    def take(self, indices: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """Return some columns of the candidates `indices` (ascending) as one table."""
        parts = []
        # Each shard gives those of the rows that fall between its first and last candidate.
        for table, first, end in zip(self._tables, self._starts, self._starts[1:], strict=False):
            low, high = np.searchsorted(indices, [first, end])
            if high > low:
                parts.append(table.select(columns).take(pa.array(indices[low:high] - first)))
        return pa.concat_tables(parts)

    def _at(self, index: int) -> tuple[pa.Table, int]:
        """Return the shard's table that holds a candidate, and its row in that table."""
        shard = bisect_right(self._starts, index) - 1
        return self._tables[shard], index - self._starts[shard]
