"""Estimators against closed forms, direct evaluation, and constructed latents.

The Gaussian case has every answer: with mu ~ N(0, 1 - s^2) and variance s^2 per dimension the
codes follow the prior, so KL = MI = Z/2 log(1/s^2) and the marginal KL is 0.

Legend: N rows, Z latent.
"""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from cdpvae.latents.gaussian import (
    active_units,
    kl_per_dim,
    mutual_information,
    variance_over_rows,
)
from cdpvae.metrics import effective_rank
from support.posteriors import gaussian_case


def direct_log_q(z, mu, logvar):
    """(N, N) log q(z_i|x_j) from (N, N, Z), by torch.distributions."""
    return Normal(mu, (logvar / 2).exp()).log_prob(z[:, None]).sum(-1)


def test_variance_of_a_hand_computed_case():
    mu = torch.tensor([[1.0, 5.0], [2.0, 5.0], [6.0, 5.0]])
    # Mean 3: (4 + 1 + 9) / 2.
    assert variance_over_rows(mu).tolist() == [7.0, 0.0]


def test_active_units_of_constructed_latents():
    """+-a has variance a^2 N/(N-1); the thresholds lie between the dimensions."""
    amplitude = torch.tensor([0.0, 0.09, 0.11, 0.3, 0.5])
    sign = torch.tensor([1.0, -1.0]).repeat(500)[:, None]
    mu = amplitude * sign + 3.0
    assert [active_units(mu, t) for t in (0.0, 0.01, 0.05, 0.1, 0.2)] == [4, 3, 2, 1, 1]


def test_a_threshold_tells_n_from_n_minus_1():
    """Variance 0.0101 with N - 1, 0.0100 - a hair with N: rows of +-0.0999, N = 100."""
    mu = 0.0999 * torch.tensor([1.0, -1.0]).repeat(50)[:, None]
    assert float((mu.double().square()).mean()) < 0.01
    assert active_units(mu, 0.01) == 1


def test_variance_survives_a_large_mean():
    """E[mu^2] - E[mu]^2 in fp32 loses a variance of 0.04 beside a mean of 1000."""
    mu = 1000.0 + 0.2 * torch.tensor([1.0, -1.0]).repeat(100)[:, None]
    exact = 0.2**2 * 200 / 199
    # fp32 spaces numbers near 1000 by 6e-5, an error of up to 3e-5 on an amplitude of 0.2.
    assert float(variance_over_rows(mu)) == pytest.approx(exact, rel=4e-4)


def test_kl_equals_the_divergence_of_torch_distributions():
    generator = torch.Generator().manual_seed(2)
    mu = torch.randn(50, 3, generator=generator)
    logvar = torch.randn(50, 3, generator=generator)
    prior = Normal(torch.zeros(3).double(), torch.ones(3).double())
    exact = kl_divergence(Normal(mu.double(), (logvar.double() / 2).exp()), prior).mean(0)
    torch.testing.assert_close(kl_per_dim(mu, logvar), exact, rtol=1e-12, atol=1e-14)


def test_gaussian_case_kl_equals_mi():
    rows, dims, noise = 3000, 2, 0.25
    mu, logvar = gaussian_case(rows, dims, noise)
    truth = dims / 2 * math.log(1 / noise)
    assert float(kl_per_dim(mu, logvar).sum()) == pytest.approx(truth, rel=1e-12)
    mi = mutual_information(mu, logvar)
    # log q(z|x)/q(z) is (z^2 - eps^2)/2 + const per dimension, of variance 1 - s^2; five standard
    # errors. The truth, 1.39, is far below the cap, 8.0: bias and gap are O(1/N) effects.
    error = 5 * math.sqrt(dims * (1 - noise) / rows)
    assert abs(mi.lower - truth) < error
    assert abs(mi.upper - truth) < error
    assert mi.lower < mi.upper < mi.cap == math.log(rows)


def test_mi_equals_direct_evaluation():
    """More rows than a chunk, and a last chunk that is not full."""
    generator = torch.Generator().manual_seed(3)
    mu, logvar, z = (torch.randn(300, 3, generator=generator).double() for _ in range(3))
    z = mu + (logvar / 2).exp() * z
    log_q = direct_log_q(z, mu, logvar)
    own = log_q.diagonal()
    others = log_q.clone().fill_diagonal_(-math.inf)
    mi = mutual_information(mu, logvar, z=z)
    lower = (own - log_q.logsumexp(1)).mean() + math.log(300)
    upper = (own - others.logsumexp(1)).mean() + math.log(299)
    assert mi.lower == pytest.approx(float(lower), abs=1e-10)
    assert mi.upper == pytest.approx(float(upper), abs=1e-10)


def test_mi_keeps_its_digits_far_from_the_origin():
    """Squares of 1e3 over a variance of e^-8 are subtracted: 1e-16 * 3e9 * Z is what is left."""
    mu, logvar = gaussian_case(200, 3, 0.2, seed=4)
    mu, logvar = mu.float().double(), logvar - 6
    near = mutual_information(mu, logvar)
    far = mutual_information(mu + 1024.0, logvar)
    assert near.lower == pytest.approx(far.lower, abs=1e-4)
    assert near.upper == pytest.approx(far.upper, rel=1e-4)


def test_mi_saturates_at_its_cap():
    """True MI 32/2 * 6 = 96 nats; 200 rows can show 5.3 of them, and the lower estimate says so."""
    mu, logvar = gaussian_case(200, 32, math.exp(-6))
    mi = mutual_information(mu, logvar)
    assert mi.cap == math.log(200)
    assert mi.cap - 1e-6 < mi.lower <= mi.cap + 1e-12
    assert mi.upper > 96


def test_a_collapsed_posterior_holds_nothing():
    mu, logvar = torch.full((64, 8), 0.1), torch.full((64, 8), -0.3)
    mi = mutual_information(mu, logvar)
    assert abs(mi.lower) < 1e-12 and abs(mi.upper) < 1e-12
    assert active_units(mu) == 0
    assert effective_rank(mu) == 0.0
    prior = torch.zeros(64, 8)
    assert kl_per_dim(prior, prior).tolist() == [0.0] * 8


def test_mi_draws_depend_on_the_seed_alone():
    mu, logvar = gaussian_case(100, 4, 0.5)
    torch.manual_seed(1)
    first = mutual_information(mu, logvar, seed=7)
    state = torch.get_rng_state()
    assert mutual_information(mu, logvar, seed=7) == first
    assert torch.equal(torch.get_rng_state(), state), "the global generator moved"
    assert mutual_information(mu, logvar, seed=8) != first
