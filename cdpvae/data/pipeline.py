"""From records to processed Arrow data: read, convert, tokenise, filter, deduplicate, write.

Order of the stages per record; whatever leaves the way is counted by its reason, with the first
case as an example. The same inputs and settings give the same rows in the same order.

    OUT/train/ OUT/validation/   Arrow, `datasets.load_from_disk`; an empty split is not written
    OUT/manifest.json            settings, inputs, tokenizer, counts, reasons, time

The data is written beside OUT and renamed at the end: OUT is whole or is not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cdpvae.config import DataConfig
from cdpvae.data.arrow import SplitWriter
from cdpvae.data.dataset import MANIFEST, SCHEMA, SPLITS, apply_target, read_manifest
from cdpvae.data.deduplication import ExactDeduplicator
from cdpvae.data.filters import Record, build_filters
from cdpvae.data.formats import CONVERTERS, Example, convert
from cdpvae.data.readers import PHASES, RawRecord, Source
from cdpvae.data.tokenization import LlamaTokenizerWrapper

CHUNK = 1000
EXCERPT = 300
# Settings that say where and how fast, not what.
_NOT_CONTENT = frozenset({"processed_dir", "input", "phase"})


@dataclass
class Counts:
    """read = sum(not_converted) + converted; converted = sum(filtered) + duplicates + kept."""

    read: int = 0
    converted: int = 0
    not_converted: dict[str, int] = field(default_factory=dict)
    filtered: dict[str, int] = field(default_factory=dict)
    duplicates: int = 0
    kept: int = 0
    train: int = 0
    validation: int = 0


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

    Raises ValueError when an input cannot be read or nothing in it converts, when no record is
    kept, and when the directory holds something else (`overwrite` replaces other processed data).
    """
    sources = [Source.parse(text) for text in config.input or PHASES[config.phase]]
    content = {
        "schema": SCHEMA,
        "settings": config.model_dump(mode="json", exclude=set(_NOT_CONTENT)),
        "inputs": [source.identity() for source in sources],
        "tokenizer": {"name": wrapper.name, "fingerprint": wrapper.fingerprint()},
    }
    path = config.processed
    if path.exists() and not _is_empty_directory(path):
        existing = _read_existing(path)
        changed = _differences(existing, content)
        if not changed and not overwrite:
            return Processed(path, existing, reused=True)
        if not overwrite:
            raise ValueError(
                f"processed_dir={path} was made with another {', '.join(changed)}; choose another "
                "directory, or replace it with --overwrite"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        manifest = _Run(config, wrapper, partial, content, progress).run(sources)
        _replace(path, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Processed(path, manifest, reused=False)


class _Run:
    """One pass over the inputs: the counters and the open files."""

    def __init__(
        self,
        config: DataConfig,
        wrapper: LlamaTokenizerWrapper,
        directory: Path,
        content: dict[str, Any],
        progress: bool,
    ) -> None:
        self.config, self.wrapper, self.directory = config, wrapper, directory
        self.content, self.progress = content, progress
        self.filters = build_filters(config)
        self.deduplicator = ExactDeduplicator()
        self.counts: dict[str, Counts] = {}
        self.examples: dict[str, dict[str, Any]] = {}
        self.read = self.kept = self.declared = 0

    def run(self, sources: list[Source]) -> dict[str, Any]:
        """Process every source into the directory -> the manifest, which is written too."""
        started, clock = datetime.now(UTC), time.monotonic()
        identity = json.dumps(self.content, sort_keys=True).encode()
        seed = hashlib.sha256(identity).hexdigest()
        self.directory.mkdir()
        with SplitWriter(self.directory, SPLITS) as writer:
            for source in sources:
                self._process(source, writer)
                if self._full:
                    break
            total = self._total()
            self._check_total(total)
            writer.finish(fingerprint=seed[:16])
        manifest = {
            **self.content,
            "split": "declared by the records" if self.declared else "by hash of the instruction",
            "counts": asdict(total),
            "sources": {name: asdict(counts) for name, counts in self.counts.items()},
            "examples": self.examples,
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - clock, 3),
        }
        (self.directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        return manifest

    @property
    def _full(self) -> bool:
        return self.config.max_samples is not None and self.kept >= self.config.max_samples

    def _process(self, source: Source, writer: SplitWriter) -> None:
        counts = self.counts.setdefault(source.name, Counts())
        keys: dict[str, None] = {}
        converted_before, read_before = counts.converted, counts.read
        # disable=None: no bar where the output is not a terminal.
        hidden = None if self.progress else True
        with tqdm(desc=source.name, unit=" records", disable=hidden) as bar:
            for chunk in _chunks(source.records()):
                self._process_chunk(source.name, chunk, counts, keys, writer)
                bar.update(len(chunk))
                if self._full:
                    break
        if counts.read == read_before:
            raise ValueError(f"input {source.name}: holds no record")
        if counts.converted == converted_before:
            reasons = ", ".join(f"{reason} ({n})" for reason, n in counts.not_converted.items())
            raise ValueError(
                f"input {source.name}: none of {counts.read - read_before} records converts: "
                f"{reasons}; keys found: {', '.join(keys) or 'none'}; formats known: "
                f"{', '.join(CONVERTERS)} (format={self.config.format})"
            )

    def _process_chunk(
        self,
        name: str,
        chunk: list[RawRecord],
        counts: Counts,
        keys: dict[str, None],
        writer: SplitWriter,
    ) -> None:
        """Convert and tokenise together, then decide record by record, in order."""
        outcomes = [self._convert(raw) for raw in chunk]
        texts = [outcome for outcome in outcomes if isinstance(outcome, Example)]
        tokens = zip(
            self.wrapper.encode_instructions([t.instruction for t in texts], truncate=False),
            self.wrapper.encode_responses([t.response for t in texts], truncate=False),
            strict=True,
        )
        for raw, outcome in zip(chunk, outcomes, strict=True):
            if self._full:
                return
            counts.read += 1
            self.read += 1
            if isinstance(raw.value, dict) and len(keys) < 20:
                keys.update(dict.fromkeys(raw.value))
            if isinstance(outcome, str):
                self._drop(counts.not_converted, "not_converted", outcome, name, raw)
                continue
            counts.converted += 1
            instruction_ids, response_ids = next(tokens)
            record = Record(
                self.read - 1,
                name,
                outcome.instruction,
                outcome.response,
                instruction_ids,
                response_ids,
            )
            self._decide(record, raw, counts, writer)

    def _convert(self, raw: RawRecord) -> Example | str:
        if raw.problem is not None:
            return raw.problem
        outcome = convert(raw.value, self.config.format)
        return outcome if isinstance(outcome, str) else apply_target(outcome, self.config.target)

    def _decide(self, record: Record, raw: RawRecord, counts: Counts, writer: SplitWriter) -> None:
        """Filters, deduplication, split; write what is kept."""
        for keep_or_reason in self.filters:
            reason = keep_or_reason(record)
            if reason is not None:
                self._drop(counts.filtered, "filtered", reason, record.source, raw)
                return
        if self.deduplicator.is_duplicate(record.instruction, record.response):
            counts.duplicates += 1
            return
        split = _declared_split(raw.value)
        if split is not None:
            self.declared += 1
        else:
            split = split_of(record.instruction, self.config.validation_fraction)
        counts.kept += 1
        self.kept += 1
        setattr(counts, split, getattr(counts, split) + 1)
        writer.add(split, record)

    def _drop(
        self, tally: dict[str, int], stage: str, reason: str, source: str, raw: RawRecord
    ) -> None:
        tally[reason] = tally.get(reason, 0) + 1
        if f"{stage}: {reason}" not in self.examples:
            shown = raw.detail or json.dumps(raw.value, default=str)
            self.examples[f"{stage}: {reason}"] = {
                "source": source,
                "position": raw.position,
                "excerpt": shown[:EXCERPT],
            }

    def _total(self) -> Counts:
        total = Counts()
        for counts in self.counts.values():
            for name, value in asdict(counts).items():
                if isinstance(value, dict):
                    tally = getattr(total, name)
                    for reason, number in value.items():
                        tally[reason] = tally.get(reason, 0) + number
                else:
                    setattr(total, name, getattr(total, name) + value)
        return total

    def _check_total(self, total: Counts) -> None:
        if total.kept == 0:
            reasons = ", ".join(f"{reason} ({n})" for reason, n in total.filtered.items())
            raise ValueError(
                f"none of {total.converted} converted records is kept: {reasons}; change the bounds"
            )
        if self.declared not in (0, total.kept):
            raise ValueError(
                f"{self.declared} of {total.kept} kept records declare a split (the key split with "
                "train or validation); either all or none must"
            )


def split_of(instruction: str, validation_fraction: float) -> str:
    """train or validation, by a hash of the text the encoder reads.

    A function of the text alone: equal instructions are never split, whatever their responses,
    and a record keeps its side when others come or go.
    """
    digest = hashlib.sha256(instruction.encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return "validation" if share < validation_fraction else "train"


def _declared_split(value: Any) -> str | None:
    """The record's own `split`, when it is the name of one of ours."""
    split = value.get("split") if isinstance(value, dict) else None
    return split if split in SPLITS else None


def _chunks(records: Iterator[RawRecord]) -> Iterator[list[RawRecord]]:
    chunk: list[RawRecord] = []
    for record in records:
        chunk.append(record)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _read_existing(path: Path) -> dict[str, Any]:
    """The manifest at `path`. Refuses what is no processed data, so that it is never replaced."""
    if not (path / MANIFEST).is_file():
        raise ValueError(
            f"processed_dir={path} exists and holds no processed data; choose another directory"
        )
    return read_manifest(path)


def _is_empty_directory(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _differences(existing: dict[str, Any], content: dict[str, Any]) -> list[str]:
    """Names of what differs, settings one by one. The tokenizer's name may differ."""
    old, new = existing["settings"], content["settings"]
    changed = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    if existing["inputs"] != content["inputs"]:
        changed.append("inputs")
    if existing["tokenizer"]["fingerprint"] != content["tokenizer"]["fingerprint"]:
        changed.append("tokenizer")
    return changed


def _replace(path: Path, partial: Path) -> None:
    """Put the finished directory in place of whatever was there."""
    if path.exists():
        old = path.with_name(f".{path.name}.old-{os.getpid()}")
        path.rename(old)
        partial.rename(path)
        shutil.rmtree(old)
    else:
        partial.rename(path)
