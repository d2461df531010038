"""Figures of latents over a stream of batches, as the original description has them.

Legend: N rows, Z latent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cdpvae.latents import MutualInformation
from cdpvae.latents.gaussian import (
    AU_THRESHOLDS,
    count_active,
    kl_per_dim,
    mutual_information,
    variance_over_rows,
)
from cdpvae.metrics import effective_rank, pairwise_similarities


@dataclass(frozen=True)
class LatentSummary:
    """Everything that `LatentStatistics` computes; nats unless said otherwise.

    active_units: count by threshold. kl_per_dim, mu_variance: (Z,). marginal_kl: KL(q(z) || p(z))
    = mean KL - MI, from the lower estimate.
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
    """Collects posteriors, then computes everything at once."""

    def __init__(self, latent_dim: int):
        self.latent_dim = latent_dim
        self._mu: list[Tensor] = []
        self._logvar: list[Tensor] = []

    def update(self, mu: Tensor, logvar: Tensor) -> None:
        """mu, logvar: (N, Z). Raises ValueError when the shapes differ or Z is another."""
        if mu.shape != logvar.shape or mu.dim() != 2 or mu.shape[1] != self.latent_dim:
            raise ValueError(
                f"mu {tuple(mu.shape)} and logvar {tuple(logvar.shape)} must both be "
                f"(rows, {self.latent_dim})"
            )
        self._mu.append(mu.detach().float().cpu())
        self._logvar.append(logvar.detach().float().cpu())

    def compute(self, seed: int = 0) -> LatentSummary:
        """seed: of the one z per row that the mutual information draws. ValueError if empty."""
        if not self._mu:
            raise ValueError("no posterior was collected; call update first")
        # Everything is computed over all rows at once.
        mu, logvar = torch.cat(self._mu), torch.cat(self._logvar)
        per_dim, variance = kl_per_dim(mu, logvar), variance_over_rows(mu)
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
