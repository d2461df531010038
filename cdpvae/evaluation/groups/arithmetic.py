"""Attributes by arithmetic: does z_b - z_a + z_c carry what b has and a lacks over to c?

Rows a and b differ in exactly one attribute; a and c agree in it and differ in others. The text of
z_b - z_a + z_c should then have b's value of that attribute, and c's values of all others.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from cdpvae.evaluation.checkpoint import OpenedRun
from cdpvae.evaluation.estimates import mean_figure
from cdpvae.evaluation.figures import Figure, FigureGroup
from cdpvae.evaluation.groups.samples import write
from cdpvae.sample.pairs import SampleSpec

Attributes = Mapping[str, str | None]
SHOWN = 5
# What is counted of a text, by the words of its figures.
CHANGED, KEPT, ALL = "changed attribute right", "other attributes kept", "all attributes right"


@dataclass(frozen=True)
class Triple:
    """Numbers of the rows a, b and c, the attribute in which a and b differ, what is expected."""

    a: int
    b: int
    c: int
    changed: str
    expected: dict[str, str | None]


def find_triples(attributes: Sequence[Attributes], count: int, *, seed: int) -> list[Triple]:
    """Choose triples at random, at most `count`; every row is an `a` once at most.

    attributes: of each row; rows that lack one are left out. seed: of the choice.
    """
    rng = random.Random(seed)
    known = [row for row, found in enumerate(attributes) if None not in found.values()]
    order = rng.sample(known, len(known))
    # Rows by what they have beside one attribute, and by the value of one.
    without: defaultdict[tuple[str, tuple[str | None, ...]], list[int]] = defaultdict(list)
    sharing: defaultdict[tuple[str, str | None], list[int]] = defaultdict(list)
    for row in order:
        for name, value in attributes[row].items():
            without[name, _others(attributes[row], name)].append(row)
            sharing[name, value].append(row)
    # For each row one that differs in a single attribute, then one that differs elsewhere.
    triples: list[Triple] = []
    for a in order:
        pairs = [
            (name, b)
            for name, value in attributes[a].items()
            for b in without[name, _others(attributes[a], name)]
            if attributes[b][name] != value
        ]
        if not pairs or len(triples) == count:
            continue
        name, b = rng.choice(pairs)
        others = [c for c in sharing[name, attributes[a][name]] if attributes[c] != attributes[a]]
        if others:
            c = rng.choice(others)
            expected = {**attributes[c], name: attributes[b][name]}
            triples.append(Triple(a, b, c, name, expected))
    return triples


def _others(found: Attributes, name: str) -> tuple[str | None, ...]:
    """Return the values of all attributes but one."""
    return tuple(value for other, value in found.items() if other != name)


def measure_arithmetic(
    opened: OpenedRun,
    means: Tensor,
    instructions: Sequence[str],
    spec: SampleSpec,
    *,
    triples: int,
    rows_per_batch: int,
    max_length: int,
    progress: Callable[[str], None],
) -> FigureGroup:
    """Decode z_b - z_a + z_c greedily, and count the attributes that the texts carry.

    opened: the run.
    means (N, *shape): of the codes of N rows.
    instructions: of the same rows; their attributes are read off them.
    spec: the attributes and the words of their values.
    triples: how many, at most.
    rows_per_batch: texts written together.
    max_length: tokens per text.
    progress: told what is under way.

    Rows without a triple give no figure but a note.
    """
    chosen = find_triples([spec.attributes_of(text) for text in instructions], triples, seed=0)
    if not chosen:
        note = f"arithmetic is left out: {len(instructions)} rows have no triple a, b, c"
        return FigureGroup(name="arithmetic", figures=[], notes=[note])
    # The text of the sum, and that of c's own z, which has not changed.
    progress(f"arithmetic: {len(chosen)} triples")
    a, b, c = (torch.tensor([getattr(t, row) for t in chosen]) for row in "abc")
    z = {"z_b - z_a + z_c": means[b] - means[a] + means[c], "z_c alone": means[c]}
    written = {
        source: write(opened, latents, rows_per_batch, max_length) for source, latents in z.items()
    }
    # Both are counted alike, beside what guessing gets.
    rows = {
        source: [
            _right(triple, spec.attributes_of(text))
            for triple, text in zip(chosen, texts, strict=True)
        ]
        for source, texts in written.items()
    }
    figures = _figures(rows, [_chance(triple, spec) for triple in chosen])
    shown = [
        {name: instructions[getattr(triple, name)] for name in "abc"}
        | {source: texts[number] for source, texts in written.items()}
        for number, triple in enumerate(chosen[:SHOWN])
    ]
    counted = {name: sum(t.changed == name for t in chosen) for name in spec.attributes}
    note = "arithmetic, triples by the attribute that changes: "
    note += ", ".join(f"{name} {count}" for name, count in counted.items() if count)
    return FigureGroup(name="arithmetic", figures=figures, texts=shown, notes=[note])


def _right(triple: Triple, found: Attributes) -> dict[str, float]:
    """Compare the attributes of a text with the expected ones; one without a value is wrong."""
    right = {name: found[name] == value for name, value in triple.expected.items()}
    kept = [is_right for name, is_right in right.items() if name != triple.changed]
    return {
        CHANGED: float(right[triple.changed]),
        KEPT: fmean(kept) if kept else 1.0,
        ALL: float(all(right.values())),
    }


def _chance(triple: Triple, spec: SampleSpec) -> dict[str, float]:
    """Return what a text with values drawn uniformly would get."""
    others = [chance for name, chance in spec.chance.items() if name != triple.changed]
    return {
        CHANGED: spec.chance[triple.changed],
        KEPT: fmean(others) if others else 1.0,
        ALL: math.prod(spec.chance.values()),
    }


def _figures(
    rows: Mapping[str, Sequence[Mapping[str, float]]], chances: Sequence[Mapping[str, float]]
) -> list[Figure]:
    """Return the three shares of each source, and those of chance.

    rows: of each source, what every triple's text got. chances: of every triple.
    """
    # A row may be the b or the c of several triples, so that errors are a little too small.
    figures: list[Figure] = []
    for what in (CHANGED, KEPT, ALL):
        figures += [
            mean_figure(
                f"{what}, {source}",
                torch.tensor([row[what] for row in counted]),
                "share",
                "mean over triples, greedy from means of codes; each row is an a once at most",
                cap=1.0,
            )
            for source, counted in rows.items()
        ]
        figures.append(
            Figure(
                name=f"{what}, chance",
                value=fmean(row[what] for row in chances),
                unit="share",
                estimator="values drawn uniformly, mean over triples",
                rows=len(chances),
                cap=1.0,
            )
        )
    return figures
