"""One group of figures measured with several seeds: mean, spread, and the table of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean, stdev
from typing import Any

from cdpvae.evaluation.figures import Figure, FigureGroup


@dataclass(frozen=True)
class SeededGroup:
    """A group as every seed measured it. seeds, groups: one each, at least one.

    Figures that a seed lacks are left out: a mean over fewer seeds is another figure.
    """

    seeds: Sequence[int]
    groups: Sequence[FigureGroup]

    @cached_property
    def values(self) -> dict[str, list[float]]:
        """The values of every figure that all seeds measured, in the order of the seeds."""
        by_name = [{f.name: f.value for f in group.figures} for group in self.groups]
        return {
            figure.name: [values[figure.name] for values in by_name]
            for figure in self.groups[0].figures
            if all(figure.name in values for values in by_name)
        }

    @property
    def mean(self) -> FigureGroup:
        """The group with the mean over seeds as each value.

        Standard errors are means as well: seeds share the rows, so they do not shrink an error that
        comes from the rows. Series, texts and notes are those of the first seed.
        """
        first = self.groups[0]
        return replace(
            first, figures=[self._mean(f) for f in first.figures if f.name in self.values]
        )

    def _mean(self, figure: Figure) -> Figure:
        errors = [group[figure.name].standard_error for group in self.groups]
        known = [error for error in errors if error is not None]
        return replace(
            figure,
            value=fmean(self.values[figure.name]),
            standard_error=fmean(known) if known else None,
        )

    def spread(self, name: str) -> float | None:
        """Return the standard deviation of a figure over seeds; None for a single seed."""
        # N - 1: the seeds are a sample of all seeds.
        values = self.values[name]
        return stdev(values) if len(values) > 1 else None

    def to_json(self) -> dict[str, Any]:
        """Return the mean as plain values, with every seed's value and their spread beside it."""
        content = self.mean.to_json()
        for figure in content["figures"]:
            figure["values"] = self.values[figure["name"]]
            figure["spread_over_seeds"] = self.spread(figure["name"])
        return {"seeds": list(self.seeds), **content}

    def lines(self) -> list[str]:
        """Return the table: value, error, spread over seeds, cap, rows, unit and estimator."""
        mean = self.mean
        width = max((len(figure.name) for figure in mean.figures), default=0)
        head = f"{'value':>11} {'error':>9} {'spread':>9} {'cap':>8} {'rows':>6}"
        lines = ["", f"{mean.name:<{width}} {head}  unit; estimator"]
        # A number that was not measured leaves its column empty.
        for figure in mean.figures:
            numbers = (
                f"{figure.value:>11.4g} {_number(figure.standard_error, 9)} "
                f"{_number(self.spread(figure.name), 9)} {_number(figure.cap, 8)} {figure.rows:>6}"
            )
            words = f"{figure.unit}; {figure.estimator}"
            note = f" ({figure.note})" if figure.note else ""
            lines.append(f"{figure.name:<{width}} {numbers}  {words}{note}")
        return [*lines, *(f"  note: {note}" for note in mean.notes)]


def _number(value: float | None, width: int) -> str:
    return " " * width if value is None else f"{value:>{width}.3g}"
