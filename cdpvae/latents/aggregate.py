"""Does the aggregate posterior cover the prior: the mixture of all rows' q(z|x) beside p(z).

A decoder is trained where the aggregate is and sampled where the prior is. Fu et al. 2019 and Dang
et al. (DG-VAE) measure the difference as here: KL of the prior to the aggregate, in every dimension
and jointly, and how many draws of the prior lie where no posterior is.

Legend: N rows of the aggregate, M latents, C latents of a chunk, G points of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cdpvae.latents.information import CHUNK_ROWS

Densities = Callable[[Tensor], Tensor]
"""(C, *shape) latents -> (C, N) log q(z_c | x_n), fp64."""

# A dimension counts as covered below this many nats of KL(p(z_d) || q(z_d)); that of DG-VAE.
COVERED_KL = 0.03
# Where p(z_d) = N(0, 1) is integrated: what lies beyond weighs 1e-15, and steps of 0.01 resolve it.
GRID_EDGE, GRID_STEPS = 8.0, 1600


def log_aggregate(log_q: Densities, z_M: Tensor, chunk_rows: int = CHUNK_ROWS) -> Tensor:
    """Return log q(z) = log 1/N sum_n q(z|x_n) of latents (M, *shape) -> (M,) fp64 nats."""
    parts = [
        densities.logsumexp(1) - math.log(densities.shape[1])
        for densities in _in_chunks(log_q, z_M, chunk_rows)
    ]
    return torch.cat(parts)


def prior_to_aggregate(
    log_p: Callable[[Tensor], Tensor],
    log_q: Densities,
    z_M: Tensor,
) -> Tensor:
    """Return log p(z) - log q(z) of draws of the prior -> (M,) fp64; its mean is KL(p || q).

    log_p: (M, *shape) latents -> (M,).
    log_q: densities of the N rows.
    z_M (M, *shape): drawn from the prior.
    """
    return log_p(z_M.double()) - log_aggregate(log_q, z_M)


def normal_to_marginal(log_q: Densities) -> float:
    """Integrate KL(N(0, 1) || q(z_d)) over a grid -> nats.

    log_q: (G,) points -> (G, N) log q(z_d = point | x_n), fp64. Only the prior's own scale has to
    be resolved: the logarithm of a mixture of narrow posteriors is smooth where its density is not.
    """
    point = torch.linspace(-GRID_EDGE, GRID_EDGE, GRID_STEPS + 1, dtype=torch.float64)
    log_p = -0.5 * (point.square() + math.log(2 * math.pi))
    # The integrand vanishes at both ends, so that equal weights are the trapezoidal rule.
    gap = log_p - log_aggregate(log_q, point)
    return float((log_p.exp() * gap).sum() * (point[1] - point[0]))


def share_in_holes(
    log_q: Densities, prior_M: Tensor, own_N: Tensor, quantile: float = 0.99
) -> float:
    """Return the share of prior draws further from every posterior than draws of the rows are.

    log_q: densities of the N rows.
    prior_M (M, *shape): drawn from the prior.
    own_N (N, *shape): row n drawn from q(z|x_n).
    quantile: of the distances of `own_N` that a prior draw has to exceed.

    The distance of z is -max_n log q(z|x_n). Draws of a row are measured against the other rows
    only, so that they know the aggregate as little as a prior draw does: where the aggregate is the
    prior, the share is 1 - quantile, however narrow the posteriors are.
    Raises ValueError for fewer than two rows.
    """
    if own_N.shape[0] < 2:
        raise ValueError(f"holes between {own_N.shape[0]} posteriors; give at least two rows")
    # How far a draw of each row is from the nearest posterior of another row.
    own, start = [], 0
    for densities in _in_chunks(log_q, own_N, CHUNK_ROWS):
        here = torch.arange(densities.shape[0])
        nothing = torch.tensor(-math.inf, dtype=densities.dtype)
        others = densities.index_put((here, start + here), nothing)
        own.append(-others.amax(1))
        start += len(here)
    limit = torch.quantile(torch.cat(own), quantile)
    # Prior draws beyond it.
    far = [-densities.amax(1) > limit for densities in _in_chunks(log_q, prior_M, CHUNK_ROWS)]
    return float(torch.cat(far).double().mean())


def _in_chunks(log_q: Densities, z_M: Tensor, chunk_rows: int) -> Iterator[Tensor]:
    """Yield the densities of the latents, a chunk at a time: all (M, N) would not fit."""
    for start in range(0, z_M.shape[0], chunk_rows):
        yield log_q(z_M[start : start + chunk_rows])
