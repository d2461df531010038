"""Records to tokenised rows while they are read, for data larger than the disk.

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
from cdpvae.preprocessing.process import RecordFilters, RecordProcessor
from cdpvae.preprocessing.readers.source import Source
from cdpvae.preprocessing.records import RawRecord, Record, StreamedRow

BLOCK_RECORDS = 10_000
RECENT_KEYS = 200_000
CHUNK = 256
# Seconds before the hub is asked again. After the last of them the run stops and can be resumed.
RETRIES = (1, 5, 25, 125)


@dataclass(frozen=True)
class BlockStart:
    """Where a block begins: all that its rows depend on.

    number: blocks of the epoch before this one.
    read: records read from each source before it.
    rows: rows kept before it.
    recent: (n,) int64 keys of the last rows, oldest first.
    """

    number: int
    read: tuple[int, ...]
    rows: int
    recent: np.ndarray

    @classmethod
    def of_epoch(cls, sources: int) -> BlockStart:
        """Return the start of an epoch's first block. sources: how many sources there are."""
        return cls(0, (0,) * sources, 0, np.zeros(0, np.int64))


class RecordStream:
    """Reads sources as blocks of rows.

    sources: the inputs.
    config: the settings of the data.
    wrapper: the tokenizer.
    block_records: records that a block spans.
    recent_keys: rows among which duplicates are found.

    counts: numbers of the records read so far, by reason.
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
        self._processor = RecordProcessor(
            config, wrapper, RecordFilters.from_config(config), "stream", tally_languages=False
        )
        self.counts = self._processor.counts

    def blocks(self, start: BlockStart) -> Iterator[tuple[BlockStart, list[StreamedRow]]]:
        """Yield every block of the epoch from `start` on, with the rows it keeps, perhaps none.

        Raises ValueError when a source cannot be read, and when a first block keeps no row.
        """
        turns = _Turns(self.sources, start.read)
        recent = _RecentKeys(self.recent_keys, start.recent)
        max_samples = self.config.max_samples
        while max_samples is None or start.rows < max_samples:
            # Read the raw records of a block.
            raw_records = turns.take(self.block_records)
            if not raw_records:
                return
            # Keep what passes the filters and repeats no recent row, up to max_samples.
            records: list[Record] = []
            for at in range(0, len(raw_records), CHUNK):
                records += self._kept(raw_records[at : at + CHUNK], recent)
            wanted = None if max_samples is None else max_samples - start.rows
            rows = [
                StreamedRow(
                    start.rows + number,
                    np.array(record.instruction_ids, np.int32),
                    np.array(record.response_ids, np.int32),
                )
                for number, record in enumerate(records[:wanted])
            ]
            self.counts.kept += len(rows)
            if start.number == 0 and not rows:
                raise ValueError(
                    f"streaming: the first {len(raw_records)} records {self.describe()}"
                )
            yield start, rows
            # The next block begins where this one has ended.
            start = BlockStart(
                start.number + 1, turns.read, start.rows + len(rows), recent.snapshot()
            )

    def describe(self) -> str:
        """Describe in one line how many rows the records have given, and why not more."""
        counts = self.counts
        reasons = {**counts.not_converted, **counts.filtered, **counts.duplicates}
        reason_list = "".join(f"; {reason}: {number}" for reason, number in reasons.items())
        return f"gave {counts.kept} rows from {counts.read} records{reason_list}"

    def _kept(self, raw_records: list[RawRecord], recent: _RecentKeys) -> Iterator[Record]:
        """Yield the records that become rows, all of them tokenised together."""
        for record in self._processor.process(enumerate(raw_records, start=self.counts.read)):
            if record.split == "validation":
                count(self.counts.filtered, "declared for validation")
            elif self._is_new(record, recent):
                yield record

    def _is_new(self, record: Record, recent: _RecentKeys) -> bool:
        """Say whether a record repeats no recent row; if it does, count it as a duplicate."""
        # Equal texts have equal keys, whatever the number of rows between them.
        if self.config.deduplication == "none":
            return True
        if recent.add(exact_key(record.instruction, record.response)):
            return True
        count(self.counts.duplicates, "exact duplicate of a recent row")
        return False


class _Turns:
    """Takes one record of each source in turn; sources that have ended are left out."""

    def __init__(self, sources: list[Source], read: tuple[int, ...]) -> None:
        self._sources = sources
        self._read = list(read)
        self._open = {
            number: _records(source, read[number]) for number, source in enumerate(sources)
        }

    @property
    def read(self) -> tuple[int, ...]:
        """How many records of each source have been taken."""
        return tuple(self._read)

    def take(self, count: int) -> list[RawRecord]:
        """Take the next `count` records, beginning with the first source; fewer at the end."""
        taken: list[RawRecord] = []
        # Each round takes one record of every source that has not ended.
        while self._open and len(taken) < count:
            for number in list(self._open)[: count - len(taken)]:
                record = next(self._open[number], None)
                if record is None:
                    del self._open[number]
                    continue
                self._read[number] += 1
                taken.append(record)
        return taken


def _records(source: Source, start: int) -> Iterator[RawRecord]:
    """Yield records from `start` on; the hub is asked again where it stopped answering."""
    waits = iter(RETRIES)
    while True:
        try:
            for record in source.records(start):
                start += 1
                waits = iter(RETRIES)
                yield record
            return
        except ValueError:
            # A file that cannot be read stays so; a hub may answer again after a while.
            wait = next(waits, None)
            if source.path is not None or wait is None:
                raise
            time.sleep(wait)


class _RecentKeys:
    """Holds the last `capacity` keys that were new, first in, first out.

    keys: (n,) int64, the keys to begin with, oldest first.
    """

    def __init__(self, capacity: int, keys: np.ndarray) -> None:
        self._capacity = capacity
        self._order = deque(keys.tolist())
        # The queue knows the order, the set answers quickly.
        self._known = set(self._order)

    def add(self, digest: bytes) -> bool:
        """Add a key, or return False when it is there already.

        64 bits of a key are kept: among 200,000 keys a row has a false match once in 10^14.
        """
        key = int.from_bytes(digest[:8], "little", signed=True)
        if key in self._known:
            return False
        self._known.add(key)
        self._order.append(key)
        # The oldest key makes room for the new one.
        if len(self._order) > self._capacity:
            self._known.discard(self._order.popleft())
        return True

    def snapshot(self) -> np.ndarray:
        """Return the keys, (n,) int64, oldest first."""
        return np.fromiter(self._order, np.int64, len(self._order))
