"""Several seeds of one group: mean, spread and the columns of the table."""

from __future__ import annotations

import pytest

from cdpvae.evaluation.figures import Figure, FigureGroup
from cdpvae.evaluation.whole.seeds import SeededGroup


def group(**values: float) -> FigureGroup:
    figures = [
        Figure(
            name=name,
            value=value,
            unit="nats per sequence",
            estimator="counted",
            rows=7,
            standard_error=0.5,
            cap=9.0,
        )
        for name, value in values.items()
    ]
    return FigureGroup(name="use", figures=figures)


def test_seeds_are_averaged_and_their_spread_is_shown():
    seeded = SeededGroup([3, 4], [group(cost=1.0, other=2.0), group(cost=4.0)])
    content = seeded.to_json()
    (figure,) = content["figures"]
    assert content["seeds"] == [3, 4]
    assert (figure["value"], figure["values"]) == (2.5, [1.0, 4.0])
    assert figure["spread_over_seeds"] == pytest.approx(4.5**0.5)
    # Seeds share the rows: their error does not shrink.
    assert figure["standard_error"] == 0.5
    line = next(line for line in seeded.lines() if line.startswith("cost"))
    assert line.split() == "cost 2.5 0.5 2.12 9 7 nats per sequence; counted".split()


def test_one_seed_has_no_spread():
    (figure,) = SeededGroup([0], [group(cost=1.0)]).to_json()["figures"]
    assert (figure["value"], figure["spread_over_seeds"]) == (1.0, None)
