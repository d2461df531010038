"""A count over batches equals the count over the whole."""

import pytest
import torch

from cdpvae.compatibility.counter import ActiveUnitsCounter
from cdpvae.latents.gaussian import active_units, variance_over_rows


# One row at a time, an uneven split, everything at once.
@pytest.mark.parametrize("batch", [1, 7, 100])
def test_counter_equals_the_whole_split(batch):
    mu = torch.randn(100, 6, generator=torch.Generator().manual_seed(1)) * torch.linspace(0, 1, 6)
    counter = ActiveUnitsCounter(6, threshold=0.05)
    for rows in mu.split(batch):
        counter.update(rows)
    torch.testing.assert_close(counter.variance, mu.double().var(0), rtol=1e-12, atol=1e-15)
    assert counter.active_units == active_units(mu, 0.05) > 0
    assert counter.active_unit_ratio == counter.active_units / 6


def test_counter_survives_a_large_mean():
    """E[mu^2] - E[mu]^2 in fp32 loses a variance of 0.04 beside a mean of 1000."""
    mu = 1000.0 + 0.2 * torch.tensor([1.0, -1.0]).repeat(100)[:, None]
    counter = ActiveUnitsCounter(1)
    for batch in mu.split(7):
        counter.update(batch)
    assert counter.active_units == 1
    assert float(counter.variance) == pytest.approx(float(variance_over_rows(mu)), rel=1e-9)


def test_another_number_of_dimensions_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 5\).*\(rows, 4\)"):
        ActiveUnitsCounter(4).update(torch.zeros(3, 5))
