"""What an evaluation reports: figures that say what they are, in groups.

A number without its unit, its cap, its rows and its estimator cannot be trusted, so none travels
without them: table, JSON file and page are all made of these two classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number.

    name: what it is, such as "cost of z shuffled".
    value: the number itself.
    unit: "nats per sequence", "bits per byte", "share", "dimensions", ...
    estimator: how it was measured, in a few words.
    rows: how many rows, texts or pairs it is measured over.
    standard_error: of an estimate that is a mean over rows; None for an exact value.
    cap: what it cannot exceed, whatever the model is.
    note: what a reader must know beside.
    """

    name: str
    value: float
    unit: str
    estimator: str
    rows: int
    standard_error: float | None = None
    cap: float | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class FigureGroup:
    """The figures of one question, such as "use of z".

    name: as `--only` names it.
    figures: in the order of the table.
    series: numbers for pictures, by name: one a dimension, a layer or a step.
    texts: examples for the page, each a mapping of what it is to the text.
    notes: what was left out, and why.
    """

    name: str
    figures: Sequence[Figure]
    series: Mapping[str, Sequence[float]] = field(default_factory=dict)
    texts: Sequence[Mapping[str, str]] = ()
    notes: Sequence[str] = ()

    def __getitem__(self, name: str) -> Figure:
        """Return a figure by name. Raises KeyError where it was not measured."""
        for figure in self.figures:
            if figure.name == name:
                return figure
        raise KeyError(name)

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "figures": [asdict(figure) for figure in self.figures],
            "series": {name: list(values) for name, values in self.series.items()},
            "texts": [dict(text) for text in self.texts],
            "notes": list(self.notes),
        }
