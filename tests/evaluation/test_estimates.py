"""Standard errors of means and ratios against repeated draws."""

from __future__ import annotations

import pytest
import torch

from cdpvae.evaluation.estimates import mean_figure, ratio_figure


def test_errors_are_the_spread_over_repeats():
    """Of 2000 samples of 50 rows: values that grow with the counts, as nats do with tokens."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(5, 40, (2000, 50), generator=generator).double()
    noise = torch.randn(2000, 50, generator=generator, dtype=torch.float64)
    values = 2 * counts + 3 * noise
    ratios = [ratio_figure("r", v, c, "", "") for v, c in zip(values, counts, strict=True)]
    spread = torch.tensor([figure.value for figure in ratios]).std()
    errors = torch.tensor([figure.standard_error for figure in ratios])
    assert float(errors.mean()) == pytest.approx(float(spread), rel=0.1)
    means = [mean_figure("m", v, "", "") for v in noise]
    spread = torch.tensor([figure.value for figure in means]).std()
    errors = torch.tensor([figure.standard_error for figure in means])
    assert float(errors.mean()) == pytest.approx(float(spread), rel=0.1)


def test_one_row_has_no_error():
    assert mean_figure("m", torch.ones(1), "", "").standard_error is None
    assert ratio_figure("r", torch.ones(1), torch.ones(1), "", "").standard_error is None
