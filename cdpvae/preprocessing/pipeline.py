"""From records to processed Arrow data: prepare, deduplicate, write, publish.

    OUT/train/ OUT/validation/   Arrow, `datasets.load_from_disk`; an empty split is not written
    OUT/manifest.json            settings, inputs, tokenizer, counts, and how this run went
    OUT/report.json report.html  what became of every record, with examples

The stages (`stages/`) work in a hidden directory beside OUT, whose result is renamed to OUT at the
end: OUT is whole or is not there. A killed run continues at its last finished shard. The same
inputs and settings give the same bytes, whatever the number of workers, the size of the shards,
the engine, and however often the run was killed; only `run` in the manifest tells the difference.
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
from cdpvae.data.dataset import MANIFEST, SPLITS
from cdpvae.data.tokenizer import LlamaTokenizerWrapper
from cdpvae.preprocessing.counts import Counts
from cdpvae.preprocessing.executors import available_cores
from cdpvae.preprocessing.manifest import (
    adopt,
    content_of,
    discard,
    fingerprint,
    reusable_manifest,
    sweep,
)
from cdpvae.preprocessing.readers.source import PHASES, Source
from cdpvae.preprocessing.report.html import html_report
from cdpvae.preprocessing.report.totals import count_sources, details, total_of
from cdpvae.preprocessing.stages.candidates import Candidates
from cdpvae.preprocessing.stages.collect import STAGE, Collector, NothingUsable
from cdpvae.preprocessing.stages.deduplicate import Decisions, Deduplicator
from cdpvae.preprocessing.stages.prepare import Preparer
from cdpvae.preprocessing.stages.write import SplitWriter

STAGES = ("prepare", "deduplicate")
SPLIT_BY_HASH = "by hash of the first instruction of each group"


@dataclass
class Processed:
    """What `preprocess` leaves. reused: the directory held exactly this already."""

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

    Raises ValueError when nothing in an input converts, when no record is kept, and when the
    directory holds something else (`overwrite` replaces other processed data); OSError when the
    disk is full or a worker dies: the same call then continues.
    """
    sources = [Source.parse(text) for text in config.input or PHASES[config.phase]]
    content = content_of(config, sources, wrapper)
    path = config.processed
    work = path.with_name(f".{path.name}.work")
    path.parent.mkdir(parents=True, exist_ok=True)
    if (existing := reusable_manifest(path, content, overwrite)) is not None:
        sweep(work)
        return Processed(path, existing, reused=True)
    with files.locked(work):
        # What a replacement that was killed half-way has put aside counts as there.
        if files.restore_directory(path):
            reusable_manifest(path, content, overwrite)
        adopt(work, content, config.shard_records)
        try:
            manifest = _Run(config, wrapper, sources, content, work, progress).run()
        except NothingUsable:
            discard(work)
            raise
        files.replace_directory(path, work / "result")
        discard(work)
    return Processed(path, manifest, reused=False)


class _Run:
    """One run over the stages, below `work`."""

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
        self.seconds: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        """All stages -> the manifest, which is in `result` with everything else."""
        started = datetime.now(UTC)
        deduplicator = Deduplicator(self.config)
        collector = Collector(
            self.config,
            self.sources,
            lambda: Preparer(self.config, self.wrapper),
            self.work,
            self.disable,
        )
        candidates = collector.run(deduplicator)
        decisions = self._decide(candidates, deduplicator)
        rows, split = self._rows(candidates, decisions, collector.problems(candidates))
        clock = time.monotonic()
        self._write(candidates, rows)
        self.seconds = {
            **{stage: files.read_json(self.work / stage / STAGE)["seconds"] for stage in STAGES},
            "write": round(time.monotonic() - clock, 3),
        }
        names = [source.name for source in self.sources]
        sources = count_sources(names, candidates, decisions, rows)
        told = {
            "split": split,
            "counts": asdict(total_of(sources)),
            "sources": {name: asdict(counts) for name, counts in sources.items()},
            "problems": collector.problems(candidates),
        }
        written = np.sort(np.concatenate(list(rows.values())))
        told_of = {"inputs": self.content["inputs"], "settings": self.content["settings"]}
        report = {**told, **told_of, **details(self.config, names, candidates, decisions, written)}
        files.write_json(self.result / "report.json", report)
        files.write_bytes(self.result / "report.html", html_report(report).encode())
        manifest = {**self.content, **told, "run": self._how(started)}
        files.write_json(self.result / MANIFEST, manifest)
        return manifest

    def _decide(self, candidates: Candidates, deduplicator: Deduplicator) -> Decisions:
        """Stage 2, or what it left. Raises NothingUsable when nothing is kept."""
        directory = self.work / "deduplicate"
        if (directory / STAGE).exists():
            return Decisions.from_table(files.map_table(directory / "decisions.arrow"))
        directory.mkdir(exist_ok=True)
        clock = time.monotonic()
        decisions = deduplicator(candidates, len(candidates))
        files.write_table(directory / "decisions.arrow", decisions.to_table())
        seconds = round(time.monotonic() - clock, 3)
        files.write_json(directory / STAGE, {"counts": decisions.counts(), "seconds": seconds})
        return decisions

    def _rows(
        self, candidates: Candidates, decisions: Decisions, problems: dict[str, str]
    ) -> tuple[dict[str, np.ndarray], str]:
        """split -> candidates to write, ascending; and how the split was made."""
        kept = decisions.kept[: self.config.max_samples]
        if not len(kept):
            raise NothingUsable(self._nothing_kept(candidates, problems))
        declared = candidates.strings("split")[kept]
        count = int(np.count_nonzero(declared != None))  # noqa: E711 (element by element)
        if count not in (0, len(kept)):
            raise NothingUsable(
                f"{count} of {len(kept)} kept records declare a split (the key split with train "
                "or validation); either all or none must"
            )
        if count:
            return {name: kept[declared == name] for name in SPLITS}, "declared by the records"
        # All of a group go where its first member goes, by a hash that is uniform over texts.
        share = candidates.column("instruction_hash")[decisions.group[kept]] / 2.0**64
        validation = share < self.config.validation_fraction
        return {"train": kept[~validation], "validation": kept[validation]}, SPLIT_BY_HASH

    def _nothing_kept(self, candidates: Candidates, problems: dict[str, str]) -> str:
        """Why there is no result at all."""
        total = Counts()
        for summary in candidates.summaries:
            total.add(Counts(**summary["counts"]))
        if not total.read:
            return "; ".join(problems.values())
        reasons = ", ".join(f"{reason} ({n})" for reason, n in total.filtered.items())
        return f"none of {total.converted} converted records is kept: {reasons}; change the bounds"

    def _write(self, candidates: Candidates, rows: dict[str, np.ndarray]) -> None:
        """Stage 3."""
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

    def _how(self, started: datetime) -> dict[str, Any]:
        """What is different every time. Seconds of a stage are those of the run that ended it."""
        return {
            "started": started.isoformat(timespec="seconds"),
            "seconds": self.seconds,
            "executor": self.config.executor,
            "workers": self.config.workers or available_cores(),
            "shard_records": self.config.shard_records,
        }
