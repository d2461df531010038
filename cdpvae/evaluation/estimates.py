"""Figures that are means or ratios of sums over rows, with the standard errors that rows give.

Legend: N rows.
"""

from __future__ import annotations

from torch import Tensor

from cdpvae.evaluation.figures import Figure
from cdpvae.evaluation.statistics import mean_and_error, ratio_and_error


def mean_figure(
    name: str,
    values_N: Tensor,
    unit: str,
    estimator: str,
    *,
    cap: float | None = None,
    note: str = "",
) -> Figure:
    """Make a figure of the mean over rows, with its standard error.

    name: of the figure.
    values_N: one a row.
    unit, estimator, cap, note: as in `Figure`.
    """
    value, error = mean_and_error(values_N)
    return Figure(
        name=name,
        value=value,
        unit=unit,
        estimator=estimator,
        rows=len(values_N),
        standard_error=error,
        cap=cap,
        note=note,
    )


def ratio_figure(
    name: str,
    values_N: Tensor,
    counts_N: Tensor,
    unit: str,
    estimator: str,
    *,
    note: str = "",
) -> Figure:
    """Make a figure of the sum of values over the sum of counts.

    name: of the figure.
    values_N, counts_N: one of each a row.
    unit, estimator, note: as in `Figure`.

    The standard error is that of `ratio_and_error`.
    """
    ratio, error = ratio_and_error(values_N, counts_N)
    return Figure(
        name=name,
        value=ratio,
        unit=unit,
        estimator=estimator,
        rows=len(values_N),
        standard_error=error,
        note=note,
    )
