"""Stage 1, all inputs: shards through an executor until the inputs, or `max_samples`, are done."""

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
from cdpvae.preprocessing.executors import make_executor
from cdpvae.preprocessing.formats.convert import SHAPES
from cdpvae.preprocessing.process import MAX_KEYS
from cdpvae.preprocessing.readers.json_array import NOT_CLOSED
from cdpvae.preprocessing.readers.parquet import DAMAGED_GROUP
from cdpvae.preprocessing.readers.problems import DAMAGED
from cdpvae.preprocessing.readers.source import Source
from cdpvae.preprocessing.stages.candidates import Candidates
from cdpvae.preprocessing.stages.max_samples import Decide, candidates_needed
from cdpvae.preprocessing.stages.prepare_shard import ShardPreparer
from cdpvae.preprocessing.stages.shards import ShardReader, stem_of

# Marks a finished stage.
STAGE_FILE = "stage.json"
Summaries = Generator[dict[str, Any], None, None]


class NothingUsable(ValueError):
    """These inputs and settings give no result: running again does not help."""


@dataclass
class PrepareStage:
    """Prepares the shards of all inputs.

    config: the settings of the data.
    sources: the inputs.
    make_preparer: makes the function that prepares one shard; called only when there is work.
    work: the work directory.
    disable: as tqdm's argument of this name, for the progress bar.
    """

    config: DataConfig
    sources: list[Source]
    make_preparer: Callable[[], ShardPreparer]
    work: Path
    disable: bool | None

    def __post_init__(self) -> None:
        self.directory, self.cut_directory = self.work / "prepare", self.work / "prepare" / "cut"
        self.reader = ShardReader(self.directory, self.sources, self.config.shard_records)
        # The first inputs are those of the validation split.
        self.held_out = len(self.config.validation_input)

    def run(self, decide: Decide) -> Candidates:
        """Return the candidates that take part, prepared now or by an earlier run.

        decide: the second stage, by which `max_samples` is counted.
        Raises NothingUsable when nothing of an input converts, or a file of the validation split
        gives no record.
        """
        stage_file = self.directory / STAGE_FILE
        candidates = Candidates()
        # An earlier run has finished the stage: its shards are enough.
        if stage_file.exists():
            for source, start, cut in read_json(stage_file)["shards"]:
                directory = self.cut_directory if cut else self.directory
                candidates.append(
                    directory, read_json(directory / f"{stem_of(source, start)}.json")
                )
            return candidates
        # Prepare the shards that no earlier run has finished.
        self.cut_directory.mkdir(parents=True, exist_ok=True)
        clock = time.monotonic()
        preparer = self.make_preparer()
        summaries = self._summaries(preparer)
        try:
            self._append_needed(candidates, summaries, decide, preparer)
        finally:
            summaries.close()
        # Write down that the stage is finished, and with which shards.
        shards = [
            [summary["source"], summary["start"], directory == self.cut_directory]
            for directory, summary in candidates.shards
        ]
        total = Counts()
        for summary in candidates.summaries:
            total.add(Counts(**summary["counts"]))
        seconds = round(time.monotonic() - clock, 3)
        write_json(stage_file, {"shards": shards, "counts": asdict(total), "seconds": seconds})
        return candidates

    def problems(self, candidates: Candidates) -> dict[str, str]:
        """Return the inputs that could not be read, or not to their end: name -> reason."""
        # Damage that ends an input is the problem of a record.
        found = {
            self.sources[summary["source"]].name: reason
            for summary in candidates.summaries
            for reason in (DAMAGED, NOT_CLOSED, DAMAGED_GROUP)
            if reason in summary["counts"]["not_converted"]
        }
        # An input that could not be read at all has no record.
        for number, source in enumerate(self.sources):
            end = self.reader.end_of(number)
            if end is not None and (end["problem"] or not end["read"]):
                found[source.name] = end["problem"] or f"input {source.name}: holds no record"
        return found

    def _append_needed(
        self,
        candidates: Candidates,
        summaries: Summaries,
        decide: Decide,
        preparer: ShardPreparer,
    ) -> None:
        """Append the candidates of all shards, or those that `max_samples` needs.

        candidates: where to append.
        summaries: the shards, prepared one after another as they are asked for.
        decide: the second stage.
        preparer: prepares the shard that is cut at `max_samples`.
        """

        def append_next_shard() -> bool:
            summary = next(summaries, None)
            if summary is not None:
                candidates.append(self.directory, summary)
            return summary is not None

        # Without a limit all shards are needed.
        if self.config.max_samples is None:
            while append_next_shard():
                pass
            return
        # The validation split is not counted: all of it is read, up to the first shard behind it.
        while append_next_shard() and candidates.summaries[-1]["source"] < self.held_out:
            pass
        # With max_samples shards are read until enough is kept, and the last is cut.
        held_out = candidates.count_before(self.held_out)
        needed = candidates_needed(
            self.config.max_samples, candidates, decide, append_next_shard, held_out
        )
        if needed is not None:
            self._cut(candidates, needed, preparer)

    def _cut(self, candidates: Candidates, needed: int, preparer: ShardPreparer) -> None:
        """End with the record of candidate `needed` - 1: prepare its shard again up to there."""
        # Later shards hold nothing that takes part.
        candidates.drop_shards_from(needed)
        summary = candidates.summaries[-1]
        last = int(candidates.column("record_number")[needed - 1])
        count = last + 1 - summary["start"]
        # The cut shard goes to a directory of its own: the whole one stays for another cut.
        if count < summary["counts"]["read"]:
            candidates.pop()
            source, start = summary["source"], summary["start"]
            shard = self.reader.first_records(self.cut_directory, source, start, count)
            candidates.append(self.cut_directory, preparer(shard))

    def _summaries(self, preparer: ShardPreparer) -> Summaries:
        """Yield the summaries of all shards in order. Raises NothingUsable at an input's end."""
        input_summaries: list[dict[str, Any]] = []
        executor = make_executor(self.config.executor, self.config.workers)
        results = executor.map(preparer, self.reader.tasks())
        with tqdm(desc="prepare", unit=" records", disable=self.disable) as bar:
            for summary in results:
                # The first shard of an input shows that the inputs before it have ended.
                if not input_summaries or input_summaries[-1]["source"] != summary["source"]:
                    self._require_converted(input_summaries)
                    self._require_read(min(self.held_out, summary["source"]))
                    input_summaries = []
                input_summaries.append(summary)
                bar.update(summary["counts"]["read"])
                yield summary
            self._require_converted(input_summaries)
            self._require_read(self.held_out)

    def _require_read(self, count: int) -> None:
        """Raise NothingUsable when one of the first `count` inputs gives no record."""
        for number, source in enumerate(self.sources[:count]):
            end = self.reader.end_of(number)
            if end is not None and not end["read"]:
                problem = end["problem"] or f"input {source.name}: holds no record"
                raise NothingUsable(
                    f"{problem}; name a file with records in validation_input, or drop it there"
                )

    def _require_converted(self, summaries: list[dict[str, Any]]) -> None:
        """Raise NothingUsable, with what was found, when nothing of an input converts."""
        # One converted record is enough: the others are reported by reason.
        if not summaries or any(summary["counts"]["converted"] for summary in summaries):
            return
        # Say what was found, and what would have been understood.
        reasons: dict[str, int] = {}
        keys: dict[str, None] = {}
        for summary in summaries:
            merge(reasons, summary["counts"]["not_converted"])
            keys.update(dict.fromkeys(summary["keys"]))
        reason_list = ", ".join(f"{reason} ({number})" for reason, number in reasons.items())
        known = "; ".join(f"{name} ({shape})" for name, shape in SHAPES.items())
        raise NothingUsable(
            f"input {self.sources[summaries[0]['source']].name}: none of {sum(reasons.values())} "
            f"records converts: {reason_list}; keys found: "
            f"{', '.join(list(keys)[:MAX_KEYS]) or 'none'}; "
            f"formats known: {known} (format={self.config.format})"
        )
