"""Records to tokenised rows as they come, for data larger than the disk.

Sources are read in turn, a record each, and cut into blocks of consecutive records. A block is the
unit that is shuffled, and a place to resume from: a `BlockStart` holds all that its rows depend on.
Conversion and filters are those of `cdpvae.preprocess`. Duplicates are found among the last
`recent_keys` rows only, and near-duplicates not at all: both need all of the data at once.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cdpvae.config import DataConfig
from cdpvae.data.tokenizer import LlamaTokenizerWrapper
from cdpvae.preprocessing.counts import count
from cdpvae.preprocessing.dedup.clusters import exact_key
from cdpvae.preprocessing.process import PairFilters, PairMaker
from cdpvae.preprocessing.readers.source import RawRecord, Source
from cdpvae.preprocessing.records import Record

BLOCK_RECORDS = 10_000
RECENT_KEYS = 200_000
CHUNK = 256
# Seconds before the hub is asked again; after the last one the run stops and can be resumed.
RETRIES = (1, 5, 25, 125)


@dataclass(frozen=True)
class Row:
    """index: number among the epoch's kept rows, from 0. Both ids int32."""

    index: int
    instruction_ids: np.ndarray
    response_ids: np.ndarray

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """As a data set's `rows` has it."""
        return {"instruction_ids": self.instruction_ids, "response_ids": self.response_ids}


@dataclass(frozen=True)
class BlockStart:
    """number: blocks of the epoch before. read: records taken of each source. rows: rows kept.

    recent: (n,) int64 keys of the last rows, oldest first.
    """

    number: int
    read: tuple[int, ...]
    rows: int
    recent: np.ndarray

    @classmethod
    def of_epoch(cls, sources: int) -> BlockStart:
        return cls(0, (0,) * sources, 0, np.zeros(0, np.int64))


class RecordStream:
    """Blocks of rows from sources. counts: what became of the records read so far, by reason.

    block_records: records a block spans. recent_keys: rows among which duplicates are found.
    """

    def __init__(
        self,
        sources: list[Source],
        config: DataConfig,
        wrapper: LlamaTokenizerWrapper,
        block_records: int = BLOCK_RECORDS,
        recent_keys: int = RECENT_KEYS,
    ) -> None:
        self.sources, self.config, self.wrapper = sources, config, wrapper
        self.block_records, self.recent_keys = block_records, recent_keys
        self._maker = PairMaker(
            config, wrapper, PairFilters.of(config), "stream", tally_languages=False
        )
        self.counts = self._maker.counts

    def blocks(self, start: BlockStart) -> Iterator[tuple[BlockStart, list[Row]]]:
        """Every block of the epoch from `start` on, with the rows it keeps, perhaps none.

        Raises ValueError when a source cannot be read, and when a first block keeps no row.
        """
        turns = _Turns(self.sources, start.read)
        recent = _RecentKeys(self.recent_keys, start.recent)
        limit = self.config.max_samples
        while limit is None or start.rows < limit:
            records = turns.take(self.block_records)
            if not records:
                return
            records_of_block = (records[at : at + CHUNK] for at in range(0, len(records), CHUNK))
            kept = [record for chunk in records_of_block for record in self._kept(chunk, recent)]
            rows = [
                Row(
                    start.rows + number,
                    np.array(record.instruction_ids, np.int32),
                    np.array(record.response_ids, np.int32),
                )
                for number, record in enumerate(
                    kept[: None if limit is None else limit - start.rows]
                )
            ]
            self.counts.kept += len(rows)
            if start.number == 0 and not rows:
                raise ValueError(f"streaming: the first {len(records)} records {self.describe()}")
            yield start, rows
            start = BlockStart(
                start.number + 1, turns.read, start.rows + len(rows), recent.snapshot()
            )

    def describe(self) -> str:
        """What became of the records, in a line."""
        counts = self.counts
        reasons = {**counts.not_converted, **counts.filtered, **counts.duplicates}
        told = "".join(f"; {reason}: {number}" for reason, number in reasons.items())
        return f"gave {counts.kept} rows from {counts.read} records{told}"

    def _kept(self, records: list[RawRecord], recent: _RecentKeys) -> Iterator[Record]:
        """The pairs that stay, tokenised together."""
        for pair in self._maker.process(enumerate(records, start=self.counts.read)):
            if pair.split == "validation":
                count(self.counts.filtered, "declared for validation")
            elif self._is_new(pair.record, recent):
                yield pair.record

    def _is_new(self, record: Record, recent: _RecentKeys) -> bool:
        if self.config.deduplication == "none":
            return True
        if recent.add(exact_key(record.instruction, record.response)):
            return True
        count(self.counts.duplicates, "exact duplicate of a recent row")
        return False


class _Turns:
    """One record of each source in turn, those that have ended left out."""

    def __init__(self, sources: list[Source], read: tuple[int, ...]) -> None:
        self._sources = sources
        self._read = list(read)
        self._open = {
            number: _records(source, read[number]) for number, source in enumerate(sources)
        }

    @property
    def read(self) -> tuple[int, ...]:
        return tuple(self._read)

    def take(self, limit: int) -> list[RawRecord]:
        """The next records, at most `limit`, beginning with the first source; none at the end."""
        taken: list[RawRecord] = []
        while self._open and len(taken) < limit:
            for number in list(self._open)[: limit - len(taken)]:
                record = next(self._open[number], None)
                if record is None:
                    del self._open[number]
                    continue
                self._read[number] += 1
                taken.append(record)
        return taken


def _records(source: Source, start: int) -> Iterator[RawRecord]:
    """Records from `start` on; the hub is asked again where it stopped answering."""
    waits = iter(RETRIES)
    while True:
        try:
            for record in source.records(start):
                start += 1
                waits = iter(RETRIES)
                yield record
            return
        except ValueError:
            wait = next(waits, None)
            if source.path is not None or wait is None:
                raise
            time.sleep(wait)


class _RecentKeys:
    """The last `limit` keys that were new, first in, first out."""

    def __init__(self, limit: int, keys: np.ndarray) -> None:
        self._limit = limit
        self._order = deque(keys.tolist())
        self._known = set(self._order)

    def add(self, digest: bytes) -> bool:
        """False when the key is among them. 64 bits: a false match in 200,000 keys is 1 in 10^14
        for a row."""
        key = int.from_bytes(digest[:8], "little", signed=True)
        if key in self._known:
            return False
        self._known.add(key)
        self._order.append(key)
        if len(self._order) > self._limit:
            self._known.discard(self._order.popleft())
        return True

    def snapshot(self) -> np.ndarray:
        """(n,) int64, oldest first."""
        return np.fromiter(self._order, np.int64, len(self._order))
