"""Adds up counts, lengths and examples of all shards: the manifest's counts, the report's content.

Records are dropped in one of three categories: not converted, filtered, duplicates.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cdpvae.config import DataConfig
from cdpvae.preprocessing.counts import Counts, Histogram, merge, most_first
from cdpvae.preprocessing.dedup.clusters import KEPT
from cdpvae.preprocessing.process import SIDES
from cdpvae.preprocessing.records import excerpt
from cdpvae.preprocessing.stages.candidates import Candidates
from cdpvae.preprocessing.stages.deduplicate import DECISIONS, Decisions

SURPLUS = "beyond max_samples"


def count_sources(
    names: list[str],
    candidates: Candidates,
    decisions: Decisions,
    rows: dict[str, np.ndarray],
) -> dict[str, Counts]:
    """Return the counts of each input by its name; inputs of the same name are added up.

    names: the names of the inputs.
    candidates: the candidates that take part.
    decisions: what the second stage decided about them.
    rows: split -> candidates that are written.
    """
    # What the first stage counted.
    parts = [Counts() for _ in names]
    for summary in candidates.summaries:
        parts[summary["source"]].add(Counts(**summary["counts"]))

    # What the second stage dropped, and what max_samples leaves over.
    sources = candidates.sources()

    def per_source(indices: np.ndarray) -> list[int]:
        return np.bincount(sources[indices], minlength=len(names)).tolist()

    for decision, name in DECISIONS.items():
        if decision != KEPT:
            numbers = per_source(np.flatnonzero(decisions.decision == decision))
            for part, number in zip(parts, numbers, strict=True):
                merge(part.duplicates, {name: number} if number else {})
    written = np.concatenate(list(rows.values()))
    surplus = np.setdiff1d(decisions.kept, written, assume_unique=True)
    for part, number in zip(parts, per_source(surplus), strict=True):
        merge(part.filtered, {SURPLUS: number} if number else {})

    # What is written to each split.
    for split, indices in rows.items():
        for part, number in zip(parts, per_source(indices), strict=True):
            part.kept += number
            setattr(part, split, getattr(part, split) + number)

    # Inputs of the same name share a row of the report.
    totals: dict[str, Counts] = {}
    for name, part in zip(names, parts, strict=True):
        totals.setdefault(name, Counts()).add(part)
    for counts in totals.values():
        counts.sort()
    return totals


def total_of(sources: dict[str, Counts]) -> Counts:
    """Add up the counts of all inputs."""
    total = Counts()
    for counts in sources.values():
        total.add(counts)
    total.sort()
    return total


def details(
    config: DataConfig,
    names: list[str],
    candidates: Candidates,
    decisions: Decisions,
    written: np.ndarray,
) -> dict[str, Any]:
    """Return what the report shows beside the counts: languages, lengths and examples.

    config: the settings of the data.
    names: the names of the inputs.
    candidates: the candidates that take part.
    decisions: what the second stage decided about them.
    written: the candidates that are written.

    lengths: side -> width of a bin, numbers before the length filter, numbers of what is kept.
    examples: "category: reason" -> the first record that was dropped so: source, record_number,
    line, excerpt, and for a duplicate `kept`, the excerpt of what stays in its place.
    """
    # Add up languages; of several examples of a reason, the first in reading order counts.
    languages: dict[str, int] = {}
    examples: dict[str, Any] = {}
    for summary in candidates.summaries:
        merge(languages, summary["languages"])
        for reason, example in summary["examples"].items():
            examples.setdefault(reason, example)
    examples.update(_duplicate_examples(names, candidates, decisions))
    # Add up the histograms of each side.
    lengths = {}
    for side in SIDES:
        before, kept = (Histogram(getattr(config, f"max_{side}_tokens")) for _ in range(2))
        for summary in candidates.summaries:
            before.merge(summary["lengths"][side])
        kept.add(candidates.list_lengths(f"{side}_ids")[written].tolist())
        lengths[side] = {"width": kept.width, "before": before.numbers, "kept": kept.numbers}
    return {
        "languages": most_first(languages),
        "lengths": lengths,
        "examples": dict(sorted(examples.items())),
    }


def _duplicate_examples(
    names: list[str], candidates: Candidates, decisions: Decisions
) -> dict[str, Any]:
    """Return the first duplicate of each kind, with what stays in its place."""
    found = {}
    for decision, name in DECISIONS.items():
        dropped = np.flatnonzero(decisions.decision == decision)
        if decision == KEPT or not len(dropped):
            continue
        first = int(dropped[0])
        found[f"duplicates: {name}"] = {
            "source": names[candidates.sources()[first]],
            **candidates.place(first),
            "excerpt": excerpt(candidates.text(first)),
            "kept": excerpt(candidates.text(int(decisions.keeper[first]))),
        }
    return found
