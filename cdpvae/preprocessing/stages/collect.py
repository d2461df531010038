"""Driving stage 1: shards through an engine until the inputs, or `max_samples`, are done."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cdpvae.config import DataConfig
from cdpvae.files import read_json, write_json
from cdpvae.preprocessing.counts import Counts, merge
from cdpvae.preprocessing.executors import make_engine
from cdpvae.preprocessing.formats.convert import SHAPES
from cdpvae.preprocessing.process import MAX_KEYS
from cdpvae.preprocessing.readers.json_array import NOT_CLOSED
from cdpvae.preprocessing.readers.parquet import DAMAGED_GROUP
from cdpvae.preprocessing.readers.record import DAMAGED
from cdpvae.preprocessing.readers.source import Source
from cdpvae.preprocessing.stages.candidates import Candidates
from cdpvae.preprocessing.stages.max_samples import Decide, candidates_needed
from cdpvae.preprocessing.stages.prepare import Preparer
from cdpvae.preprocessing.stages.shards import ShardReader, stem_of

STAGE = "stage.json"
Summaries = Generator[dict[str, Any], None, None]


class NothingUsable(ValueError):
    """These inputs and settings give no result: running again does not help."""


@dataclass
class Collector:
    """Stage 1 over all inputs, below `work`. disable: of the progress bar, as tqdm has it."""

    config: DataConfig
    sources: list[Source]
    make_preparer: Callable[[], Preparer]
    work: Path
    disable: bool | None

    def __post_init__(self) -> None:
        self.directory, self.cut_directory = self.work / "prepare", self.work / "prepare" / "cut"
        self.reader = ShardReader(self.directory, self.sources, self.config.shard_records)

    def run(self, decide: Decide) -> Candidates:
        """All candidates that take part. Raises NothingUsable when an input gives none."""
        done = self.directory / STAGE
        candidates = Candidates()
        if done.exists():
            for source, start, cut in read_json(done)["shards"]:
                directory = self.cut_directory if cut else self.directory
                candidates.append(
                    directory, read_json(directory / f"{stem_of(source, start)}.json")
                )
            return candidates
        self.cut_directory.mkdir(parents=True, exist_ok=True)
        clock = time.monotonic()
        preparer = self.make_preparer()
        summaries = self._summaries(preparer)
        try:
            self._collect(candidates, summaries, decide, preparer)
        finally:
            summaries.close()
        shards = [
            [summary["source"], summary["start"], directory == self.cut_directory]
            for directory, summary in candidates.shards
        ]
        total = Counts()
        for summary in candidates.summaries:
            total.add(Counts(**summary["counts"]))
        seconds = round(time.monotonic() - clock, 3)
        write_json(done, {"shards": shards, "counts": asdict(total), "seconds": seconds})
        return candidates

    def problems(self, candidates: Candidates) -> dict[str, str]:
        """Names of inputs that could not be read, or not to their end, and why."""
        found = {
            self.sources[summary["source"]].name: reason
            for summary in candidates.summaries
            for reason in (DAMAGED, NOT_CLOSED, DAMAGED_GROUP)
            if reason in summary["counts"]["not_converted"]
        }
        for number, source in enumerate(self.sources):
            end = self.reader.end_of(number)
            if end is not None and (end["problem"] or not end["read"]):
                found[source.name] = end["problem"] or f"input {source.name}: holds no record"
        return found

    def _collect(
        self, candidates: Candidates, summaries: Summaries, decide: Decide, preparer: Preparer
    ) -> None:
        def more() -> bool:
            summary = next(summaries, None)
            if summary is not None:
                candidates.append(self.directory, summary)
            return summary is not None

        if self.config.max_samples is None:
            while more():
                pass
            return
        needed = candidates_needed(self.config.max_samples, candidates, decide, more)
        if needed is not None:
            self._cut(candidates, needed, preparer)

    def _cut(self, candidates: Candidates, needed: int, preparer: Preparer) -> None:
        """End with the record of candidate `needed` - 1: its shard is made again, up to it."""
        candidates.drop_shards_from(needed)
        summary = candidates.summaries[-1]
        last = int(candidates.column("position")[needed - 1])
        count = last + 1 - summary["start"]
        if count < summary["counts"]["read"]:
            candidates.pop()
            source, start = summary["source"], summary["start"]
            shard = self.reader.first_records(self.cut_directory, source, start, count)
            candidates.append(self.cut_directory, preparer(shard))

    def _summaries(self, preparer: Preparer) -> Summaries:
        """Summaries of all shards in order; each input is checked at its end."""
        seen: list[dict[str, Any]] = []
        engine = make_engine(self.config.executor, self.config.workers)
        results = engine.map(preparer, self.reader.tasks())
        with tqdm(desc="prepare", unit=" records", disable=self.disable) as bar:
            for summary in results:
                if seen and seen[-1]["source"] != summary["source"]:
                    self._check(seen)
                    seen = []
                seen.append(summary)
                bar.update(summary["counts"]["read"])
                yield summary
            if seen:
                self._check(seen)

    def _check(self, summaries: list[dict[str, Any]]) -> None:
        """An input of which nothing converts is a mistake, and says what was found."""
        if any(summary["counts"]["converted"] for summary in summaries):
            return
        reasons: dict[str, int] = {}
        keys: dict[str, None] = {}
        for summary in summaries:
            merge(reasons, summary["counts"]["not_converted"])
            keys.update(dict.fromkeys(summary["keys"]))
        told = ", ".join(f"{reason} ({number})" for reason, number in reasons.items())
        known = "; ".join(f"{name} ({shape})" for name, shape in SHAPES.items())
        raise NothingUsable(
            f"input {self.sources[summaries[0]['source']].name}: none of {sum(reasons.values())} "
            f"records converts: {told}; keys found: {', '.join(list(keys)[:MAX_KEYS]) or 'none'}; "
            f"formats known: {known} (format={self.config.format})"
        )
