"""Gaussian posteriors that by their form stay away from the prior N(0, 1).

Each holds a least rate, in nats per dimension, without free bits and at any weight of the KL. What
is held is the rate, not that z says anything: the cost of a shuffled z tells that.

- `batch_norm` (Zhu et al. 2020, "A Batch Normalized Inference Network Keeps the KL Vanishing Away",
  section 3): mu is normalised over the rows, then has standard deviation gamma. The mean over these
  rows of mu^2/2 is at least gamma^2/2 =: rate, and the KL is never below mu^2/2. It is a statement
  about the rows of a training batch; with running averages it holds as far as these are right.
- `delta` (Razavi et al. 2019, "Preventing Posterior Collapse with delta-VAEs", section 2, for a
  prior without structure): the variance stays below the v < 1 with (v - 1 - log v)/2 = rate, which
  is the KL at mu = 0, so that every row has at least the rate.
- `mu_forcing` (Liu et al. 2019, "mu-Forcing: Training Variational Recurrent Autoencoders for Text
  Generation"): a penalty of max(0, rate x Z - mean over rows of |mu|^2/2), with weight 1. It gives
  way where the KL's weight a nat is above that.

Means over rows are those of one rank's micro-batch, the augmented views included.

Legend: B rows, Z latent dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Small against the variance of a mu that has hardly started, unlike torch's 1e-5: the bound is
# gamma^2/2 x variance / (variance + EPSILON).
EPSILON = 1e-8
MOMENTUM = 0.1


class NormalizedMean(nn.Module):
    """Batch norm of mu with a fixed gamma = sqrt(2 rate) and a learned shift.

    latent_dim: Z. rate: nats per dimension, above 0.

    Training normalises by the rows at hand and keeps running averages (MOMENTUM, as torch's);
    evaluation uses those, as does a single row, which has no variance.
    """

    running_mean: Tensor
    running_variance: Tensor

    def __init__(self, latent_dim: int, rate: float) -> None:
        super().__init__()
        self.gamma = math.sqrt(2 * rate)
        self.shift = nn.Parameter(torch.zeros(latent_dim))
        self.register_buffer("running_mean", torch.zeros(latent_dim))
        self.register_buffer("running_variance", torch.ones(latent_dim))

    def forward(self, mu_BZ: Tensor) -> Tensor:
        """Normalise mu (B, Z) fp32 over its rows in training, by running averages otherwise."""
        mean, variance = self.running_mean, self.running_variance
        if self.training and len(mu_BZ) > 1:
            mean, variance = mu_BZ.mean(0), mu_BZ.var(0, unbiased=False)
            if torch.is_grad_enabled():
                self._remember(mean.detach(), variance.detach())
        return self.gamma * (mu_BZ - mean) * (variance + EPSILON).rsqrt() + self.shift.float()

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running averages, unless a step that will be skipped has no finite numbers."""
        found = torch.stack((mean, variance))
        for running, now in zip((self.running_mean, self.running_variance), found, strict=True):
            running.copy_(torch.where(found.isfinite().all(), running.lerp(now, MOMENTUM), running))


class BoundedVariance(nn.Module):
    """Keep logvar below the bound at which the KL of mu = 0 is the rate.

    rate: nats per dimension, above 0.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.most = largest_logvar(rate)

    def forward(self, logvar_BZ: Tensor) -> Tensor:
        """Bend logvar (B, Z) smoothly below the bound; far below it, it stays as it is."""
        return self.most - F.softplus(self.most - logvar_BZ)


def largest_logvar(rate: float) -> float:
    """Solve (exp(x) - 1 - x)/2 = rate for x < 0, by bisection; nats.

    Raises ValueError for a rate that is not above 0.
    """
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"rate={rate}: a bound of the variance needs a finite rate above 0 nats")
    # The KL falls from above the rate at the lower end to 0 at x = 0.
    low, high = -2 * rate - 1.0, 0.0
    for _ in range(200):
        middle = (low + high) / 2
        if (math.expm1(middle) - middle) / 2 >= rate:
            low = middle
        else:
            high = middle
    return low


def missing_mean_square(mu_BZ: Tensor, rate: float) -> Tensor:
    """Return max(0, rate x Z - mean over rows of |mu|^2/2), the same for every row -> (B,) nats."""
    found = mu_BZ.square().sum(1).mean() / 2
    return F.relu(rate * mu_BZ.shape[1] - found).expand(len(mu_BZ))
