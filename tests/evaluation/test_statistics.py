"""Standard errors against closed forms."""

from __future__ import annotations

import math

import pytest

from cdpvae.evaluation.statistics import jackknife_errors, mean_and_error, ratio_and_error


def test_a_mean_has_the_usual_error():
    assert mean_and_error([1.0, 2.0, 3.0]) == (2.0, pytest.approx(1 / math.sqrt(3)))
    assert mean_and_error([5.0]) == (5.0, None)


def test_a_ratio_weighs_by_the_denominator():
    """With equal denominators it is the mean of the quotients, and so is its error."""
    value, error = ratio_and_error([2.0, 4.0, 6.0], [2, 2, 2])
    assert (value, error) == (2.0, pytest.approx(mean_and_error([1.0, 2.0, 3.0])[1]))
    assert ratio_and_error([1.0, 9.0], [1, 3])[0] == 2.5
    assert math.isnan(ratio_and_error([0.0], [0])[0])


def test_the_jackknife_of_a_mean_is_its_error():
    """With a row a part it is exact for a mean."""
    values = [3.0, 1.0, 4.0, 1.0, 5.0]
    errors = jackknife_errors(lambda rows: [sum(values[r] for r in rows) / len(rows)], 5)
    assert errors == pytest.approx([mean_and_error(values)[1]])
    assert jackknife_errors(lambda rows: [0.0], 1) is None
