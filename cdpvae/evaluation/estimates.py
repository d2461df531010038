"""Figures that are means or ratios of sums over rows, with the standard errors that rows give.

Legend: N rows.
"""

from __future__ import annotations

import math

from torch import Tensor

from cdpvae.evaluation.figures import Figure


def standard_error(values_N: Tensor) -> float | None:
    """Return the standard error of the mean over rows; None for fewer than two."""
    if len(values_N) < 2:
        return None
    return float(values_N.double().std() / math.sqrt(len(values_N)))


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
    return Figure(
        name=name,
        value=float(values_N.double().mean()),
        unit=unit,
        estimator=estimator,
        rows=len(values_N),
        standard_error=standard_error(values_N),
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

    The standard error is that of a ratio of means, to first order (Cochran 1977, section 6.4).
    """
    values, counts = values_N.double(), counts_N.double()
    ratio = values.sum() / counts.sum()
    error = standard_error((values - ratio * counts) / counts.mean())
    return Figure(
        name=name,
        value=float(ratio),
        unit=unit,
        estimator=estimator,
        rows=len(values),
        standard_error=error,
        note=note,
    )
