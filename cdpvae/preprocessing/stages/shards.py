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
from cdpvae.preprocessing.readers.source import RawRecord, Source

# Records may be of any length, and several shards are in memory at a time.
MAX_CHARACTERS = 2**26


@dataclass(frozen=True)
class Shard:
    """Some raw records of one input, and where their candidates go.

    source: number of the input, from 0. start: raw records of that input before this shard.
    """

    directory: Path
    source: int
    name: str
    start: int
    records: tuple[RawRecord, ...] = field(repr=False)

    @property
    def stem(self) -> str:
        return stem_of(self.source, self.start)


def stem_of(source: int, start: int) -> str:
    """File name of a shard, without its ending; names sort in reading order."""
    return f"{source:03d}-{start:010d}"


class ShardReader:
    """The shards of every input in order, finished ones as their summaries.

    A local file that cannot be read, or not to its end, is a problem to report beside the rest;
    a hub that does not answer stops the run, as trying again may help.
    """

    def __init__(self, directory: Path, sources: list[Source], shard_records: int) -> None:
        self.directory, self.sources, self.shard_records = directory, sources, shard_records

    def tasks(self) -> Iterator[Shard | Ready]:
        """Shards to prepare, and `Ready` in place of those a former run has finished."""
        for number in range(len(self.sources)):
            yield from self._tasks_of(number)

    def first_records(self, directory: Path, number: int, start: int, count: int) -> Shard:
        """`count` records of an input from `start` on, as a shard of another directory."""
        taken = tuple(itertools.islice(self.sources[number].records(start), count))
        return Shard(directory, number, self.sources[number].name, start, taken)

    def end_of(self, number: int) -> dict[str, Any] | None:
        """{read, problem} of an input that was read to its end; None before that."""
        path = self._end_path(number)
        return read_json(path) if path.exists() else None

    def _tasks_of(self, number: int) -> Iterator[Shard | Ready]:
        start = 0
        while (path := self.directory / f"{stem_of(number, start)}.json").exists():
            summary = read_json(path)
            yield Ready(summary)
            start += summary["counts"]["read"]
        end = self.end_of(number)
        if end is not None and end["read"] <= start:
            return
        problem: list[str] = []
        for records in self._cut(self.sources[number], start, problem):
            yield Shard(self.directory, number, self.sources[number].name, start, records)
            start += len(records)
        write_json(
            self._end_path(number), {"read": start, "problem": problem[0] if problem else None}
        )

    def _cut(
        self, source: Source, start: int, problem: list[str]
    ) -> Iterator[tuple[RawRecord, ...]]:
        """Tuples of at most `shard_records`; says in `problem` why reading ended."""
        taken: list[RawRecord] = []
        characters = 0
        try:
            for record in source.records(start):
                taken.append(record)
                characters += _characters(record.value)
                if len(taken) == self.shard_records or characters > MAX_CHARACTERS:
                    yield tuple(taken)
                    taken, characters = [], 0
        except ValueError as error:
            if source.path is None:
                raise
            problem.append(str(error))
        if taken:
            yield tuple(taken)

    def _end_path(self, number: int) -> Path:
        return self.directory / f"{number:03d}-end.json"


def _characters(value: Any) -> int:
    """Of all texts in a record; without recursion, as records may be nested."""
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
