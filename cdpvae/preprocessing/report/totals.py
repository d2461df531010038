"""Adding up what became of every record: the manifest's counts and the report's content."""

from __future__ import annotations

from typing import Any

import numpy as np

from cdpvae.config import DataConfig
from cdpvae.preprocessing.counts import Counts, Histogram, excerpt, merge, most_first
from cdpvae.preprocessing.dedup.clusters import KEPT
from cdpvae.preprocessing.stages.candidates import Candidates
from cdpvae.preprocessing.stages.deduplicate import OUTCOMES, Decisions

SURPLUS = "beyond max_samples"


def count_sources(
    names: list[str], candidates: Candidates, decisions: Decisions, rows: dict[str, np.ndarray]
) -> dict[str, Counts]:
    """Input name -> counts, inputs of the same name together. rows: split -> candidates written."""
    parts = [Counts() for _ in names]
    for summary in candidates.summaries:
        parts[summary["source"]].add(Counts(**summary["counts"]))
    sources = candidates.sources()

    def per_source(indices: np.ndarray) -> list[int]:
        return np.bincount(sources[indices], minlength=len(names)).tolist()

    written = np.concatenate(list(rows.values()))
    surplus = np.setdiff1d(decisions.kept, written, assume_unique=True)
    for outcome, name in OUTCOMES.items():
        if outcome != KEPT:
            for part, number in zip(
                parts, per_source(np.flatnonzero(decisions.outcome == outcome)), strict=True
            ):
                merge(part.duplicates, {name: number} if number else {})
    for part, number in zip(parts, per_source(surplus), strict=True):
        merge(part.filtered, {SURPLUS: number} if number else {})
    for split, indices in rows.items():
        for part, number in zip(parts, per_source(indices), strict=True):
            part.add(Counts(**{"kept": number, split: number}))
    found: dict[str, Counts] = {}
    for name, part in zip(names, parts, strict=True):
        found.setdefault(name, Counts()).add(part)
    for counts in found.values():
        counts.sort()
    return found


def total_of(sources: dict[str, Counts]) -> Counts:
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
    """languages, lengths (side -> bins before the length filter and of what is kept), examples."""
    languages: dict[str, int] = {}
    examples: dict[str, Any] = {}
    for summary in candidates.summaries:
        merge(languages, summary["languages"])
        for reason, example in summary["examples"].items():
            examples.setdefault(reason, example)
    examples.update(_duplicate_examples(names, candidates, decisions))
    lengths = {}
    for side in ("instruction", "response"):
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
    """The first case of each kind, beside what stays in its place."""
    found = {}
    for outcome, name in OUTCOMES.items():
        cases = np.flatnonzero(decisions.outcome == outcome)
        if outcome == KEPT or not len(cases):
            continue
        case = int(cases[0])
        found[f"duplicates: {name}"] = {
            "source": names[candidates.sources()[case]],
            "position": int(candidates.column("position")[case]) + 1,
            "excerpt": excerpt(candidates.text(case)),
            "kept": excerpt(candidates.text(int(decisions.keeper[case]))),
        }
    return found
