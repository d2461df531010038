"""Importance weights on a linear-Gaussian decoder, whose log p(x) is known exactly."""

from __future__ import annotations

import math

import pytest
import torch

from cdpvae.config import GaussianConfig, ModelConfig
from cdpvae.latents import Gaussian, GeneratorNoise, NoLatent, Posterior
from cdpvae.latents.importance import (
    DrawsOfOneRow,
    effective_samples,
    log_weights,
    running_log_mean,
)

Z, X, ROWS, SPREAD = 8, 20, 60, 0.5


class LinearGaussian:
    """x = W z + SPREAD e, with orthogonal columns, so that the true posterior is diagonal."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(31)
        basis = torch.linalg.qr(torch.randn(X, Z, generator=generator, dtype=torch.float64))[0]
        self.scale = torch.linspace(0.3, 2.0, Z, dtype=torch.float64)
        self.weight = basis * self.scale
        z = torch.randn(ROWS, Z, generator=generator, dtype=torch.float64)
        noise = torch.randn(ROWS, X, generator=generator, dtype=torch.float64)
        self.x = z @ self.weight.T + SPREAD * noise

    def nll(self, x, z):
        """-log p(x | z) of rows x (X,) or (K, X) and latents (K, Z)."""
        square = (x - z.double() @ self.weight.T).square().sum(1) / SPREAD**2
        return 0.5 * (square + X * math.log(2 * math.pi * SPREAD**2))

    def exact(self):
        """-log p(x): x is Gaussian with covariance W W' + SPREAD^2."""
        covariance = self.weight @ self.weight.T + SPREAD**2 * torch.eye(X, dtype=torch.float64)
        law = torch.distributions.MultivariateNormal(torch.zeros(X).double(), covariance)
        return -law.log_prob(self.x)

    def posterior(self, factor=1.0, shift=0.0):
        """q(z|x): the true one, its variance times `factor` and its mean off by `shift` sigma."""
        variance = 1 / (1 + self.scale**2 / SPREAD**2)
        mean = (self.x @ self.weight) / SPREAD**2 * variance + shift * variance.sqrt()
        return Posterior(mean, (factor * variance).log().expand(ROWS, Z).clone())

    def neg_elbo(self, q):
        """-ELBO in closed form: E_q of the quadratic form, and the KL."""
        variance = q.logvar.exp()
        square = (self.x - q.mu @ self.weight.T).square().sum(1)
        square = square + (variance * self.scale**2).sum(1)
        nll = 0.5 * (square / SPREAD**2 + X * math.log(2 * math.pi * SPREAD**2))
        return nll + 0.5 * (q.mu.square() + variance - 1 - q.logvar).sum(1)


def family():
    config = ModelConfig(latent=GaussianConfig(latent_dim=Z), vae_hidden_dim=8)
    return Gaussian.of(config, 4)


def weights_of(decoder, q, samples, seed=0):
    latent, generator = family(), torch.Generator().manual_seed(seed)
    return torch.stack(
        [
            log_weights(
                latent,
                q.rows(row, row + 1),
                lambda z, row=row: decoder.nll(decoder.x[row], z),
                noise=GeneratorNoise(generator),
                samples=samples,
            )
            for row in range(ROWS)
        ]
    )


def test_the_true_posterior_weighs_every_draw_the_same():
    """p(x|z) p(z) / q(z|x) is p(x) for every z then: one draw is exact."""
    decoder = LinearGaussian()
    weights = weights_of(decoder, decoder.posterior(), 3)
    torch.testing.assert_close(-weights, decoder.exact()[:, None].expand(-1, 3), rtol=0, atol=1e-4)
    torch.testing.assert_close(effective_samples(weights), torch.full((ROWS,), 3.0).double())


def test_a_wrong_posterior_converges_to_the_exact_value_from_above():
    decoder = LinearGaussian()
    q = decoder.posterior(factor=1.5, shift=0.3)
    exact, bound = decoder.exact().mean(), decoder.neg_elbo(q).mean()
    # The wrong q costs: 0.5 * Z * (1.5 - 1 - ln 1.5 + 0.09) nats, KL(q || posterior).
    assert float(bound - exact) == pytest.approx(0.5 * Z * (0.59 - math.log(1.5)), abs=1e-9)
    running = -running_log_mean(weights_of(decoder, q, 500)).mean(0)
    gaps = [float(running[k - 1] - exact) for k in (1, 5, 25, 500)]
    assert gaps[0] > gaps[1] > gaps[2] > gaps[3] > -0.02
    assert gaps[1] < 0.5 * gaps[0] and gaps[3] < 0.1


def test_one_draw_is_the_elbo():
    """Within its standard error, over many repeats of k = 1."""
    decoder = LinearGaussian()
    q = decoder.posterior(factor=1.5, shift=0.3)
    weights = -weights_of(decoder, q, 2000, seed=1)
    value, error = weights.mean(1), weights.std(1) / 2000**0.5
    surprise = (value - decoder.neg_elbo(q)) / error
    # Each row within four errors, and all of them together without a tendency.
    assert float(surprise.abs().max()) < 4
    assert abs(float(surprise.mean())) < 3 / ROWS**0.5


def test_running_means_are_those_of_the_first_draws():
    weights = torch.tensor([[0.0, math.log(3.0), math.log(2.0)]], dtype=torch.float64)
    expected = torch.tensor([[1.0, 2.0, 2.0]], dtype=torch.float64).log()
    torch.testing.assert_close(running_log_mean(weights), expected)
    assert float(effective_samples(weights)) == pytest.approx(36 / 14)


def test_draws_of_one_row_differ():
    noise = DrawsOfOneRow(GeneratorNoise(torch.Generator().manual_seed(0))).normal(50, (3,))
    assert noise.shape == (50, 3) and len(noise.unique()) == 150


def test_no_density_and_no_sample_are_refused():
    empty = NoLatent().infer(torch.zeros(1, 0))
    noise = GeneratorNoise(torch.Generator())
    with pytest.raises(ValueError, match="no density"):
        log_weights(NoLatent(), empty, lambda z: z.sum(1), noise=noise, samples=2)
    with pytest.raises(ValueError, match="samples=0"):
        log_weights(NoLatent(), empty, lambda z: z.sum(1), noise=noise, samples=0)
