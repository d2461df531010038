"""Inputs cut into shards of raw records: the tasks of the first stage.

Shards bound memory and what a killed run repeats. Nothing in the result depends on their size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cdpvae.files import read_json, write_json
from cdpvae.preprocessing.executors import Ready
from cdpvae.preprocessing.readers.source import Source
from cdpvae.preprocessing.records import RawRecord

# Records may be of any length, and several shards are in memory at a time.
MAX_CHARACTERS = 2**26


@dataclass(frozen=True)
class Shard:
    """Some consecutive raw records of one input.

    directory: where the candidates are written.
    source: number of the input, from 0.
    name: name of the input.
    start: record_number of the first record.
    records: the raw records.
    """

    directory: Path
    source: int
    name: str
    start: int
    records: tuple[RawRecord, ...] = field(repr=False)

    @property
    def stem(self) -> str:
        """The name of the shard's files without their endings."""
        return stem_of(self.source, self.start)


def stem_of(source: int, start: int) -> str:
    """Return the name of a shard's files without their endings; names sort in reading order."""
    return f"{source:03d}-{start:010d}"


class ShardReader:
    """Reads the inputs in order and cuts them into shards.

    A local file that cannot be read, or not to its end, is a problem that is reported while the
    other inputs are processed; a hub that does not answer stops the run, as running again may help.
    """

    def __init__(self, directory: Path, sources: list[Source], shard_records: int) -> None:
        self.directory, self.sources, self.shard_records = directory, sources, shard_records

    def tasks(self) -> Iterator[Shard | Ready]:
        """Yield the shards to prepare, and `Ready` in place of those already finished."""
        for number in range(len(self.sources)):
            yield from self._input_tasks(number)

    def first_records(self, directory: Path, number: int, start: int, count: int) -> Shard:
        """Read a shard of a given number of records.

        directory: where its candidates are to be written.
        number: number of the input.
        start: record_number of the first record.
        count: how many records.
        """
        records = tuple(itertools.islice(self.sources[number].records(start), count))
        return Shard(directory, number, self.sources[number].name, start, records)

    def end_of(self, number: int) -> dict[str, Any] | None:
        """Return {read, problem} of an input that was read to its end; None before that."""
        path = self._end_path(number)
        return read_json(path) if path.exists() else None

    def _input_tasks(self, number: int) -> Iterator[Shard | Ready]:
        """Yield the tasks of one input."""
        # Shards that an earlier run has finished come first.
        start = 0
        while (path := self.directory / f"{stem_of(number, start)}.json").exists():
            summary = read_json(path)
            yield Ready(summary)
            start += summary["counts"]["read"]
        end = self.end_of(number)
        if end is not None and end["read"] <= start:
            return
        # Read the rest, and write down where and why the input ended.
        problem = None
        source = self.sources[number]
        shards = self._cut(source, start)
        try:
            for records in shards:
                yield Shard(self.directory, number, source.name, start, records)
                start += len(records)
        except _EndedEarly as error:
            problem = str(error)
        write_json(self._end_path(number), {"read": start, "problem": problem})

    def _cut(self, source: Source, start: int) -> Iterator[tuple[RawRecord, ...]]:
        """Yield the records from `start` on, at most `shard_records` at a time.

        Raises _EndedEarly, after the records before it, for a local file that cannot be read on.
        """
        # A shard ends at its number of records, or earlier when these are long.
        records: list[RawRecord] = []
        characters = 0
        problem = None
        try:
            for record in source.records(start):
                records.append(record)
                characters += _characters(record.value)
                if len(records) == self.shard_records or characters > MAX_CHARACTERS:
                    yield tuple(records)
                    records, characters = [], 0
        except ValueError as error:
            if source.path is None:
                raise
            problem = str(error)
        # The last shard may be shorter; what was read before a damage is not lost.
        if records:
            yield tuple(records)
        if problem is not None:
            raise _EndedEarly(problem)

    def _end_path(self, number: int) -> Path:
        return self.directory / f"{number:03d}-end.json"


class _EndedEarly(Exception):
    """A local file cannot be read, or not to its end."""


def _characters(value: Any) -> int:
    """Count the characters of all texts in a record; not recursive, as records may be nested."""
    total, waiting = 0, [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, Mapping):
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)
    return total
