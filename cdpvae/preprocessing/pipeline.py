"""From records to processed Arrow data: prepare, deduplicate, write, publish.

    OUT/train/ OUT/validation/   Arrow, `datasets.load_from_disk`; an empty split is not written
    OUT/manifest.json            settings, inputs, tokenizer, counts, and how this run went
    OUT/report.json report.html  every reason why records were dropped, with numbers and examples

The stages (`stages/`) work in a hidden directory beside OUT, whose result is renamed to OUT at the
end: OUT is whole or does not exist. A killed run continues at its last finished shard. The same
inputs and settings give the same bytes, whatever the number of workers, where they run, the size of
the shards, and however often the run was killed; only `run` in the manifest differs.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cdpvae import files
from cdpvae.config import DataConfig
from cdpvae.data.dataset import MANIFEST
from cdpvae.data.tokenizer import LlamaTokenizerWrapper
from cdpvae.preprocessing.executors import available_cores
from cdpvae.preprocessing.manifest import content_of, fingerprint, reusable_manifest
from cdpvae.preprocessing.readers.source import Inputs, Source
from cdpvae.preprocessing.report.html import html_report
from cdpvae.preprocessing.report.totals import count_sources, details, total_of
from cdpvae.preprocessing.stages.candidates import Candidates
from cdpvae.preprocessing.stages.deduplicate import Decisions, Deduplicator
from cdpvae.preprocessing.stages.prepare import STAGE_FILE, NothingUsable, PrepareStage
from cdpvae.preprocessing.stages.prepare_shard import ShardPreparer
from cdpvae.preprocessing.stages.split import split_rows
from cdpvae.preprocessing.stages.write import SplitWriter
from cdpvae.preprocessing.work_directory import open_work, remove_finished_work, remove_work

# The stages that leave a STAGE_FILE; the third one ends with the result.
STAGES = ("prepare", "deduplicate")


@dataclass
class Processed:
    """The result of `preprocess`. reused: an earlier run had made exactly this."""

    path: Path
    manifest: dict[str, Any]
    reused: bool


def preprocess(
    config: DataConfig,
    wrapper: LlamaTokenizerWrapper,
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> Processed:
    """Write `config.processed`, or find it there already.

    config: the settings of the data.
    wrapper: the tokenizer.
    overwrite: replace processed data that other settings or inputs made.
    progress: show progress bars where the output is a terminal.

    Raises ValueError when nothing in an input converts, when no record is kept, when a file of
    `validation_input` gives none, and when the directory holds something else; OSError when the
    disk is full or a worker dies: the same call then continues.
    """
    inputs = Inputs.of(config)
    content = content_of(config, inputs, wrapper)
    path = config.processed
    work = path.with_name(f".{path.name}.work")
    path.parent.mkdir(parents=True, exist_ok=True)
    # The same content has been processed before.
    if (existing := reusable_manifest(path, content, overwrite)) is not None:
        remove_finished_work(work)
        return Processed(path, existing, reused=True)
    with files.locked(work):
        # Data that a killed replacement has moved aside is moved back, and must not be lost now.
        if files.restore_directory(path):
            reusable_manifest(path, content, overwrite)
        # Begin or continue the work, and put its result in place.
        open_work(work, content, config.shard_records)
        try:
            manifest = _Run(config, wrapper, inputs.in_order, content, work, progress).run()
        except NothingUsable:
            remove_work(work)
            raise
        files.replace_directory(path, work / "result")
        remove_work(work)
    return Processed(path, manifest, reused=False)


class _Run:
    """One run over the stages.

    config: the settings of the data.
    wrapper: the tokenizer.
    sources: the inputs, those of the validation split first.
    content: all that the rows depend on.
    work: the work directory.
    progress: show progress bars where the output is a terminal.
    """

    def __init__(
        self,
        config: DataConfig,
        wrapper: LlamaTokenizerWrapper,
        sources: list[Source],
        content: dict[str, Any],
        work: Path,
        progress: bool,
    ) -> None:
        self.config, self.wrapper, self.sources = config, wrapper, sources
        self.content, self.work, self.result = content, work, work / "result"
        # disable=None: no bar where the output is not a terminal.
        self.disable = None if progress else True

    def run(self) -> dict[str, Any]:
        """Run all stages; return the manifest, which lies in `result` with everything else."""
        started = datetime.now(UTC)
        # Stage 1: convert, filter and tokenise.
        deduplicator = Deduplicator(self.config)
        prepare = PrepareStage(
            self.config,
            self.sources,
            lambda: ShardPreparer(self.config, self.wrapper),
            self.work,
            self.disable,
        )
        candidates = prepare.run(deduplicator)
        problems = prepare.problems(candidates)
        # Stage 2: decide which candidates stay, and in which split.
        decisions = self._decide(candidates, deduplicator)
        rows, split_rule = split_rows(self.config, candidates, decisions, problems)
        # Stage 3: write them.
        clock = time.monotonic()
        self._write(candidates, rows)
        seconds = {
            **{
                stage: files.read_json(self.work / stage / STAGE_FILE)["seconds"]
                for stage in STAGES
            },
            "write": round(time.monotonic() - clock, 3),
        }
        # Write the report and the manifest.
        names = [source.name for source in self.sources]
        sources = count_sources(names, candidates, decisions, rows)
        summary = {
            "split": split_rule,
            "counts": asdict(total_of(sources)),
            "sources": {name: asdict(counts) for name, counts in sources.items()},
            "problems": problems,
        }
        written = np.sort(np.concatenate(list(rows.values())))
        self._write_report(summary, details(self.config, names, candidates, decisions, written))
        manifest = {**self.content, **summary, "run": self._conditions(started, seconds)}
        files.write_json(self.result / MANIFEST, manifest)
        return manifest

    def _decide(self, candidates: Candidates, deduplicator: Deduplicator) -> Decisions:
        """Return the decisions of stage 2, made now or by an earlier run."""
        directory = self.work / "deduplicate"
        if (directory / STAGE_FILE).exists():
            return Decisions.from_table(files.map_table(directory / "decisions.arrow"))
        directory.mkdir(exist_ok=True)
        clock = time.monotonic()
        decisions = deduplicator(candidates, len(candidates))
        # The stage file comes last: it says that the decisions are complete.
        files.write_table(directory / "decisions.arrow", decisions.to_table())
        seconds = round(time.monotonic() - clock, 3)
        files.write_json(directory / STAGE_FILE, {"counts": decisions.counts(), "seconds": seconds})
        return decisions

    def _write(self, candidates: Candidates, rows: dict[str, np.ndarray]) -> None:
        """Write the rows of every split."""
        writer = SplitWriter(
            self.result,
            candidates,
            [source.name for source in self.sources],
            fingerprint(self.content)[:16],
        )
        total = sum(map(len, rows.values()))
        with tqdm(total=total, desc="write", unit=" rows", disable=self.disable) as bar:
            for split, indices in rows.items():
                for count in writer.write(split, indices):
                    bar.update(count)

    def _write_report(self, summary: dict[str, Any], details: dict[str, Any]) -> None:
        """Write `report.json` and the page made from it."""
        origin = ("inputs", "validation_input", "settings")
        content = {key: self.content[key] for key in origin if key in self.content}
        report = {**summary, **content, **details}
        files.write_json(self.result / "report.json", report)
        files.write_bytes(self.result / "report.html", html_report(report).encode())

    def _conditions(self, started: datetime, seconds: dict[str, float]) -> dict[str, Any]:
        """Return what differs between runs. Each stage has the seconds of the run that ended it."""
        return {
            "started": started.isoformat(timespec="seconds"),
            "seconds": seconds,
            "executor": self.config.executor,
            "workers": self.config.workers or available_cores(),
            "shard_records": self.config.shard_records,
        }
