"""Cover and holes where the aggregate is known: equal to the prior, and shrunken."""

from __future__ import annotations

import math

import pytest
import torch

from cdpvae.config import GaussianConfig, ModelConfig
from cdpvae.latents import Gaussian, Posterior
from cdpvae.latents.aggregate import (
    COVERED_KL,
    log_aggregate,
    normal_to_marginal,
    prior_to_aggregate,
    share_in_holes,
)


def normal(rows, dims, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dims, generator=generator, dtype=torch.float64)


def posteriors(rows, dims, spread, noise):
    """Means of standard deviation `spread`, all with standard deviation `noise`."""
    mu = normal(rows, dims, 70) * spread
    return Posterior(mu, torch.full_like(mu, 2 * math.log(noise)))


def family(dims) -> Gaussian:
    return Gaussian.of(ModelConfig(latent=GaussianConfig(latent_dim=dims), vae_hidden_dim=8), 4)


def marginal(latent, code, dim):
    return normal_to_marginal(lambda points: latent.log_q_of_dim(points, dim, code))


def test_densities_of_dimensions_multiply_to_that_of_z():
    latent, code, z = family(3), posteriors(5, 3, 0.8, 0.6), normal(1, 3, 1)
    parts = [latent.log_q_of_dim(z[:, dim], dim, code) for dim in range(3)]
    torch.testing.assert_close(sum(parts), latent.log_q(z, code))


@pytest.mark.parametrize("mean, deviation", [(0.0, 1.0), (0.7, 1.0), (0.0, 0.3), (-0.5, 1.8)])
def test_the_grid_integrates_the_closed_formula(mean, deviation):
    """KL(N(0, 1), N(m, s^2)) = ln s + (1 + m^2)/2s^2 - 1/2; one posterior is its aggregate."""
    code = Posterior(torch.full((1, 1), mean), torch.full((1, 1), 2 * math.log(deviation)))
    exact = math.log(deviation) + (1 + mean**2) / (2 * deviation**2) - 0.5
    assert marginal(family(1), code, 0) == pytest.approx(exact, abs=1e-6)


def test_an_aggregate_that_is_the_prior_is_covered_and_a_shrunken_one_is_not():
    latent = family(2)
    full, shrunken = posteriors(2000, 2, 0.8, 0.6), posteriors(2000, 2, 0.3, 0.3)
    for dim in range(2):
        assert marginal(latent, full, dim) < COVERED_KL / 3
        # N(0, 0.18) as an aggregate: about ln 0.424 + 1/0.36 - 1/2.
        assert marginal(latent, shrunken, dim) == pytest.approx(1.42, rel=0.2)


def gap_and_share(code, draws=4000):
    latent, rows = family(code.mu.shape[1]), code.num_rows
    prior = normal(draws, code.mu.shape[1], 71)
    own = code.mu + (0.5 * code.logvar).exp() * normal(rows, code.mu.shape[1], 72)
    gap = prior_to_aggregate(latent.prior.log_prob, lambda z: latent.log_q(z, code), prior)
    return float(gap.mean()), share_in_holes(lambda z: latent.log_q(z, code), prior, own)


def test_the_joint_gap_is_that_of_one_gaussian():
    """Equal posteriors are one Gaussian: in every dimension ln s + (1 + m^2)/2s^2 - 1/2."""
    code = Posterior(torch.full((7, 3), 0.4), torch.full((7, 3), 2 * math.log(0.7)))
    exact = 3 * (math.log(0.7) + 1.16 / 0.98 - 0.5)
    gap, _ = gap_and_share(code, draws=40000)
    assert gap == pytest.approx(exact, rel=0.03)


def test_holes_are_rare_in_a_full_aggregate_and_wide_in_a_shrunken_one():
    gap, share = gap_and_share(posteriors(2000, 2, 0.8, 0.6))
    assert abs(gap) < 0.03 and 0.002 < share < 0.025
    # Narrow posteriors that together are the prior have no more holes than wide ones.
    _, share = gap_and_share(posteriors(2000, 2, math.sqrt(0.99), 0.1))
    assert 0.002 < share < 0.025
    # Around 2.6 deviations of N(0, 0.18) hold 99 % of it; of the prior lies much more outside.
    gap, share = gap_and_share(posteriors(2000, 2, 0.3, 0.3))
    assert gap > 2 and share > 0.4


def test_chunks_do_not_matter_and_a_row_alone_is_refused():
    latent, code, z = family(2), posteriors(5, 2, 0.8, 0.6), normal(7, 2, 3)

    def log_q(part):
        return latent.log_q(part, code)

    torch.testing.assert_close(log_aggregate(log_q, z, chunk_rows=3), log_aggregate(log_q, z))
    expected = torch.stack([log_q(z)[:, n].exp() for n in range(5)]).mean(0).log()
    torch.testing.assert_close(log_aggregate(log_q, z), expected)
    with pytest.raises(ValueError, match="at least two rows"):
        share_in_holes(log_q, z, z[:1])
