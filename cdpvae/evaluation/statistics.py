"""Standard errors of means, of ratios, and of scores that belong to a whole corpus."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean

import torch
from torch import Tensor

# Parts of the rows that the jackknife leaves out one after another.
JACKKNIFE_PARTS = 10


def mean_and_error(values: Sequence[float] | Tensor) -> tuple[float, float | None]:
    """Return the mean of independent values (N,) and its standard error, None for a single one."""
    numbers = torch.as_tensor(values, dtype=torch.float64)
    if not len(numbers):
        return math.nan, None
    error = float(numbers.std() / math.sqrt(len(numbers))) if len(numbers) > 1 else None
    return float(numbers.mean()), error


def ratio_and_error(
    numerators: Sequence[float] | Tensor, denominators: Sequence[float] | Tensor
) -> tuple[float, float | None]:
    """Return sum over sum of paired values (N,), and its standard error by linearisation.

    Cochran 1977, section 6.3. NaN without anything to divide by.
    """
    above = torch.as_tensor(numerators, dtype=torch.float64)
    below = torch.as_tensor(denominators, dtype=torch.float64)
    total = float(below.sum())
    if not total:
        return math.nan, None
    ratio = float(above.sum()) / total
    # Numerator and denominator vary together; the residuals hold both.
    _, error = mean_and_error(above - ratio * below)
    return ratio, None if error is None else error * len(below) / total


def jackknife_errors(
    score: Callable[[Sequence[int]], Sequence[float]], rows: int
) -> list[float] | None:
    """Return the standard errors of scores of a corpus; None for fewer than two rows.

    score: scores of the rows with these numbers, always equally many. rows: of the whole corpus.
    The delete-a-group jackknife: rows are dealt to parts, and each part is left out in turn.
    """
    parts = min(JACKKNIFE_PARTS, rows)
    if parts < 2:
        return None
    # Rows are dealt in turn, so that no part holds neighbours only.
    left_out = [score([r for r in range(rows) if r % parts != part]) for part in range(parts)]
    # The variance between parts, for each score.
    errors = []
    for values in zip(*left_out, strict=True):
        mean = fmean(values)
        spread = sum((value - mean) ** 2 for value in values)
        errors.append(math.sqrt(spread * (parts - 1) / parts))
    return errors
