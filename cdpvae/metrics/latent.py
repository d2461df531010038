"""Estimate on posteriors: active units, KL, mutual information, effective rank, similarities.

All of them describe the encoder. None proves that a decoder uses z; the z-use test does.

Legend: N rows, Z latent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# Variances of mu above which a dimension counts as active; the first is the one of the literature.
AU_THRESHOLDS = (0.01, 0.05, 0.1, 0.2)
# Rows whose densities under all posteriors are computed at once.
CHUNK_ROWS = 256


def count_active(variance: Tensor, threshold: float = AU_THRESHOLDS[0]) -> int:
    """Count the dimensions that vary by more than `threshold`. Burda et al. 2016, 5.2.

    variance: (Z,), of the posterior mean over rows, with N-1.
    """
    return int((variance > threshold).sum())


def active_units(mu: Tensor, threshold: float = AU_THRESHOLDS[0]) -> int:
    """Count the active dimensions of N posterior means, (N, Z)."""
    return count_active(mu_variance(mu), threshold)


def mu_variance(mu: Tensor) -> Tensor:
    """Compute the variance over rows with N-1, (N, Z) -> (Z,) fp64; zeros for a single row."""
    if mu.shape[0] < 2:
        return torch.zeros(mu.shape[1], dtype=torch.float64)
    return mu.double().var(dim=0, unbiased=True)


def variance_from_sums(rows: float, total: Tensor, square: Tensor) -> Tensor:
    """Compute the variance over rows with N-1 from sums that add up over batches and ranks.

    rows: N. total, square: (Z,) fp64, the sums over rows of mu and of its square.
    -> (Z,) fp64; zeros for a single row.
    """
    if rows < 2:
        return torch.zeros_like(total)
    return (square - total.square() / rows) / (rows - 1)


def kl_per_dim(mu: Tensor, logvar: Tensor) -> Tensor:
    """(N, Z) -> (Z,) fp64 nats, mean over rows of KL(q(z_d|x) || N(0, 1))."""
    mu, logvar = mu.double(), logvar.double()
    return (0.5 * (mu.square() + logvar.exp() - 1.0 - logvar)).mean(0)


@dataclass(frozen=True)
class MutualInformation:
    """Hold I(x; z) in nats, estimated from N rows.

    `lower` cannot exceed `cap` = log N; `upper` leaves each row out of its own mixture and
    overshoots once the posteriors are further apart than N rows tell.
    """

    lower: float
    upper: float
    cap: float


def mutual_information(
    mu: Tensor, logvar: Tensor, *, z: Tensor | None = None, seed: int = 0
) -> MutualInformation:
    """E log q(z|x) - E log q(z), q(z) the mixture of all N posteriors, one z per row.

    The estimator of Hoffman & Johnson 2016 as Li et al. 2019 compute it, over all rows at once.
    mu, logvar: (N, Z). z: (N, Z), drawn with `seed` when None. Raises ValueError for no row.
    """
    if mu.shape[0] == 0:
        raise ValueError("mutual information of 0 rows; give at least one")
    mu, logvar = mu.double().cpu(), logvar.double().cpu()
    rows, dims = mu.shape
    if z is None:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(rows, dims, generator=generator, dtype=torch.float64)
        z = mu + (0.5 * logvar).exp() * noise
    lower, upper = [], []
    for start in range(0, rows, CHUNK_ROWS):
        log_q = _log_density(z.double()[start : start + CHUNK_ROWS], mu, logvar)
        here = torch.arange(log_q.shape[0])
        # The same draw in both halves: their noise cancels, and no row can exceed log N.
        own = log_q[here, start + here]
        lower.append(own - log_q.logsumexp(1) + math.log(rows))
        if rows > 1:
            others = log_q.index_put((here, start + here), torch.tensor(-math.inf).double())
            upper.append(own - others.logsumexp(1) + math.log(rows - 1))
    least = float(torch.cat(lower).mean())
    most = float(torch.cat(upper).mean()) if upper else least
    return MutualInformation(least, most, math.log(rows))


def _log_density(z_CZ: Tensor, mu_NZ: Tensor, logvar_NZ: Tensor) -> Tensor:
    """log N(z_c; mu_n, var_n) -> (C, N), expanded into matrix products, fp64."""
    precision = torch.exp(-logvar_NZ)
    square = z_CZ.square() @ precision.T - 2 * z_CZ @ (mu_NZ * precision).T
    constant = (mu_NZ.square() * precision + logvar_NZ + math.log(2 * math.pi)).sum(1)
    return -0.5 * (square + constant)


def effective_rank(mu: Tensor) -> float:
    """Compute exp of the entropy of the normalised singular values of the centred (N, Z) means.

    Roy & Vetterli 2007. 0 when all rows are equal.
    """
    values = torch.linalg.svdvals(mu.double() - mu.double().mean(0))
    total = values.sum()
    if total <= 1e-12:
        return 0.0
    # A singular value of 0 adds nothing to the entropy, but its logarithm is not finite.
    p = values / total
    p = p[p > 0]
    return float(torch.exp(-(p * p.log()).sum()))


def pairwise_similarities(mu: Tensor, limit: int = 2000) -> tuple[float, float, float]:
    """Compare every pair of different rows among the first `limit` rows of mu, (N, Z).

    -> mean cosine, largest cosine, mean Euclidean distance; zeros for fewer than two rows.
    """
    mu = mu[:limit].double()
    rows = mu.shape[0]
    if rows < 2:
        return 0.0, 0.0, 0.0
    # Each pair once: the triangle above the diagonal.
    unit = F.normalize(mu, dim=1)
    upper = torch.triu_indices(rows, rows, offset=1)
    cosine = (unit @ unit.T)[upper[0], upper[1]]
    return float(cosine.mean()), float(cosine.max()), float(torch.pdist(mu).mean())


@dataclass(frozen=True)
class LatentSummary:
    """Hold everything that `LatentStatistics` computes; nats unless said otherwise.

    rows: N.
    active_units: active dimensions by threshold.
    kl_total: mean over rows of KL(q(z|x) || N(0, I)); kl_per_dim (Z,): its parts.
    mutual_information: I(x; z).
    marginal_kl: KL(q(z) || p(z)) = mean KL - MI, from the lower estimate.
    effective_rank: of the posterior means, 0 to Z.
    mean_cosine, max_cosine, mean_distance: of pairs of posterior means.
    mu_variance (Z,): over rows, with N-1.
    """

    rows: int
    active_units: dict[float, int]
    kl_total: float
    kl_per_dim: Tensor
    mutual_information: MutualInformation
    marginal_kl: float
    effective_rank: float
    mean_cosine: float
    max_cosine: float
    mean_distance: float
    mu_variance: Tensor


class LatentStatistics:
    """Collect posteriors, then compute everything at once. latent_dim: Z."""

    def __init__(self, latent_dim: int) -> None:
        self.latent_dim = latent_dim
        self._mu: list[Tensor] = []
        self._logvar: list[Tensor] = []

    def update(self, mu: Tensor, logvar: Tensor) -> None:
        """Add N posteriors: mu, logvar (N, Z). Raises ValueError for other shapes."""
        if mu.shape != logvar.shape or mu.dim() != 2 or mu.shape[1] != self.latent_dim:
            raise ValueError(
                f"mu {tuple(mu.shape)} and logvar {tuple(logvar.shape)} must both be "
                f"(rows, {self.latent_dim})"
            )
        # Collected on the CPU: a split may not fit on the device beside the model.
        self._mu.append(mu.detach().float().cpu())
        self._logvar.append(logvar.detach().float().cpu())

    def compute(self, seed: int = 0) -> LatentSummary:
        """Compute the summary of all posteriors added so far.

        seed: of the one z per row that the mutual information draws.
        Raises ValueError when no posterior was added.
        """
        if not self._mu:
            raise ValueError("no posterior was collected; call update first")
        mu, logvar = torch.cat(self._mu), torch.cat(self._logvar)
        # Compute first what several entries are made of.
        per_dim, variance = kl_per_dim(mu, logvar), mu_variance(mu)
        information = mutual_information(mu, logvar, seed=seed)
        mean_cosine, max_cosine, mean_distance = pairwise_similarities(mu)
        return LatentSummary(
            rows=len(mu),
            active_units={t: count_active(variance, t) for t in AU_THRESHOLDS},
            kl_total=float(per_dim.sum()),
            kl_per_dim=per_dim,
            mutual_information=information,
            marginal_kl=float(per_dim.sum()) - information.lower,
            effective_rank=effective_rank(mu),
            mean_cosine=mean_cosine,
            max_cosine=max_cosine,
            mean_distance=mean_distance,
            mu_variance=variance,
        )
