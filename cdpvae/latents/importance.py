"""The importance-weighted likelihood: how likely a text is, closer than the ELBO bounds it.

Burda et al. 2016, "Importance Weighted Autoencoders", equation 8: log p(x) is at least the
expectation of log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x), z_k ~ q(z|x), and this grows towards it
with K. K = 1 is the ELBO.

Legend: B rows, K draws of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cdpvae.latents.base import Code, Latent
from cdpvae.latents.noise import Noise


@dataclass(frozen=True)
class DrawsOfOneRow:
    """Noise of many draws of the one row that `noise` belongs to."""

    noise: Noise

    def normal(self, num_rows: int, shape: tuple[int, ...]) -> Tensor:
        """Return standard normal numbers (num_rows, *shape), a draw each."""
        return self.noise.normal(1, (num_rows, *shape))[0]


def log_weights(
    latent: Latent,
    code: Code,
    nll: Callable[[Tensor], Tensor],
    *,
    noise: Noise,
    samples: int,
) -> Tensor:
    """Return log p(x|z_k) + log p(z_k) - log q(z_k|x) of one row -> (K,) fp64 nats.

    latent: the family, with its prior.
    code: q(z|x) of the one row.
    nll: (K, *shape) latents -> (K,) nats, -log p(x|z_k).
    noise: of the one row.
    samples: K.

    Raises ValueError for a family without a density, and for samples < 1.
    """
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1: the likelihood is a mean of them")
    # Every draw is of the same posterior.
    repeated = code.map(lambda tensor: tensor.expand(samples, *tensor.shape[1:]))
    z = latent.sample(repeated, DrawsOfOneRow(noise))
    density = latent.log_q(z, code)
    if density is None:
        raise ValueError(
            f"{type(latent).__name__} has no density log q(z|x), so its draws cannot be weighted; "
            "read the NLL from z ~ q instead"
        )
    # In fp64: a weight is a difference of numbers that are hundreds of nats each.
    return -nll(z).double() + latent.prior.log_prob(z.double()) - density[:, 0].double()


def running_log_mean(log_weights_BK: Tensor) -> Tensor:
    """Return the estimates of log p(x) from the first 1, 2, ..., K draws -> (B, K) nats."""
    counts = torch.arange(1, log_weights_BK.shape[1] + 1, dtype=log_weights_BK.dtype)
    return log_weights_BK.logcumsumexp(1) - counts.log().to(log_weights_BK.device)


def effective_samples(log_weights_BK: Tensor) -> Tensor:
    """Return how many equal weights the weights of each row amount to -> (B,), 1 to K.

    Kong 1992: (sum w)^2 / sum w^2. Near 1, a single draw decides the estimate.
    """
    return torch.exp(2 * log_weights_BK.logsumexp(1) - (2 * log_weights_BK).logsumexp(1))
