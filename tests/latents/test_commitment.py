"""Posteriors that hold a least rate: the bound on batches, per row, and what evaluation uses.

Legend: B rows, Z latent dimensions.
"""

from __future__ import annotations

import math

import pytest
import torch

from cdpvae.config import GaussianConfig, ModelConfig
from cdpvae.latents import Gaussian
from cdpvae.latents.commitment import (
    BoundedVariance,
    NormalizedMean,
    largest_logvar,
    missing_mean_square,
)
from cdpvae.latents.gaussian import kl_per_row_dim

D, Z = 12, 6


def family(posterior: str, rate: float) -> Gaussian:
    torch.manual_seed(0)
    latent = GaussianConfig(latent_dim=Z, posterior=posterior, committed_rate=rate)
    settings = {"vae_hidden_dim": 8, "encoder_dropout": 0.0, "pooling_dropout": 0.0}
    return Gaussian.of(ModelConfig(latent=latent, **settings), D)


def pooled(rows: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(rows, D, generator=torch.Generator().manual_seed(rows))


# Published bounds for 32 dimensions: gamma 0.6 holds 5.76 nats, 1.2 holds 23.04.
@pytest.mark.parametrize("gamma", [0.6, 1.2])
# Texts that differ and texts that hardly do: mu would collapse without the norm.
@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_batch_norm_holds_d_gamma_squared_halves(gamma, scale):
    latent = family("batch_norm", gamma**2 / 2)
    code = latent.infer(pooled(16, scale))
    torch.testing.assert_close(code.mu.mean(0), torch.zeros(Z), atol=1e-4, rtol=0)
    spread = code.mu.std(0, unbiased=False)
    torch.testing.assert_close(spread, torch.full((Z,), gamma), rtol=1e-2, atol=0)
    # At the variance of the prior the KL is the bound; everywhere else it is above.
    least = kl_per_row_dim(code.mu, torch.zeros_like(code.mu)).sum(1).mean()
    assert least.item() == pytest.approx(Z * gamma**2 / 2, rel=2e-2)
    assert latent.penalties(code)["kl"].sum(1).mean() >= least
    # A shift adds to the rate, never takes from it.
    latent.normalized_mean.shift.data.fill_(0.3)
    shifted = kl_per_row_dim(latent.infer(pooled(16, scale)).mu, torch.zeros(16, Z)).sum(1).mean()
    assert (shifted - least).item() == pytest.approx(Z * 0.3**2 / 2, rel=1e-3)


def test_published_bounds():
    for gamma, nats in ((0.6, 5.76), (0.7, 7.84), (0.9, 12.96), (1.2, 23.04)):
        norm = NormalizedMean(32, nats / 32)
        assert norm.gamma == pytest.approx(gamma)
        mu = norm(torch.randn(64, 32, generator=torch.Generator().manual_seed(1)))
        assert (mu.square().sum(1).mean() / 2).item() == pytest.approx(nats, rel=1e-4)


def test_evaluation_uses_running_averages_and_leaves_them():
    norm = NormalizedMean(2, 0.5)
    rows = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
    for _ in range(200):
        norm(rows)
    torch.testing.assert_close(norm.running_mean, torch.tensor([2.0, 20.0]))
    torch.testing.assert_close(norm.running_variance, torch.tensor([1.0, 100.0]))
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    assert before.keys() == {"shift", "running_mean", "running_variance"}
    norm.eval()
    # Each row for itself: one text gets the same z alone as among others.
    torch.testing.assert_close(norm(rows[:1]), torch.tensor([[-1.0, -1.0]]))
    norm.train()
    torch.testing.assert_close(norm(rows[1:]), torch.tensor([[1.0, 1.0]]))
    with torch.no_grad():
        norm(10 * rows)
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_numbers_that_are_not_finite_do_not_reach_the_running_averages():
    norm = NormalizedMean(2, 0.5)
    norm(torch.tensor([[math.nan, 1.0], [0.0, 2.0]]))
    assert norm.running_mean.isfinite().all() and norm.running_variance.isfinite().all()


@pytest.mark.parametrize("rate", [0.01, 0.15, 1.0, 3.0])
def test_delta_bound_holds_in_every_row_and_dimension(rate):
    edge = largest_logvar(rate)
    assert edge < 0 and (math.exp(edge) - 1 - edge) / 2 == pytest.approx(rate, rel=1e-9)
    bounded = BoundedVariance(rate)
    # Whatever the head says, and at mu = 0 where the mean adds nothing.
    logvar = bounded(torch.linspace(-10, 50, 500).reshape(-1, 1))
    kl = kl_per_row_dim(torch.zeros_like(logvar), logvar)
    assert kl.min().item() >= rate * (1 - 1e-5)
    assert kl.min().item() == pytest.approx(rate, rel=1e-4)
    # Without it the same head would give the prior.
    assert kl_per_row_dim(torch.zeros(1, 1), torch.zeros(1, 1)).item() == 0
    # Far below the bound the head is free.
    assert bounded(torch.tensor(edge - 12)).item() == pytest.approx(edge - 12, abs=1e-4)


def test_delta_family_holds_the_bound():
    latent = family("delta", 0.6)
    code = latent.infer(pooled(8))
    assert family("free", 0.0).penalties(family("free", 0.0).infer(pooled(8)))["kl"].min() < 0.6
    assert latent.penalties(code)["kl"].min().item() >= 0.6 - 1e-6
    code.logvar.sum().backward()
    assert latent.encoder.logvar_head.weight.grad.abs().sum() > 0


def test_mu_forcing_by_hand():
    # Mean of |mu|^2 / 2 over rows: (2 + 0.5) / 2 = 1.25 nats; asked for are 3 x 2.
    mu = torch.tensor([[2.0, 0.0], [0.0, 1.0]], requires_grad=True)
    penalty = missing_mean_square(mu, 3.0)
    assert penalty.tolist() == [4.75, 4.75]
    penalty.mean().backward()
    torch.testing.assert_close(mu.grad, -mu.detach() / 2)
    # Enough is enough.
    assert missing_mean_square(mu, 0.6).tolist() == [0.0, 0.0]
    latent = family("mu_forcing", 0.5)
    assert latent.penalties(latent.infer(pooled(4)))["mu_forcing"].shape == (4,)


def test_a_free_posterior_has_no_further_tensor():
    names = set(family("free", 0.0).state_dict())
    assert set(family("delta", 0.5).state_dict()) == names
    added = set(family("batch_norm", 0.5).state_dict()) - names
    assert added == {
        f"normalized_mean.{name}" for name in ("shift", "running_mean", "running_variance")
    }


def test_a_bound_needs_a_rate():
    with pytest.raises(ValueError, match="rate=0.0"):
        largest_logvar(0.0)
