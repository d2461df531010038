"""Count active units over a stream of batches: a class of the description's API.

Training does not use this module; `LatentStatistics` and the collapse monitor keep the posteriors.

Legend: N rows, Z latent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cdpvae.latents.gaussian import ACTIVE_VARIANCE, count_active


class ActiveUnitsCounter:
    """Keep a running two-pass variance of mu over batches. Chan et al. 1979.

    latent_dim: Z. threshold: variance above which a dimension is active.
    """

    def __init__(self, latent_dim: int, threshold: float = ACTIVE_VARIANCE) -> None:
        self.latent_dim, self.threshold = latent_dim, threshold
        self.reset()

    def reset(self) -> None:
        """Forget every row."""
        self.count = 0
        self.mean = torch.zeros(self.latent_dim, dtype=torch.float64)
        self.square = torch.zeros(self.latent_dim, dtype=torch.float64)

    def update(self, mu: Tensor) -> None:
        """Add the rows of mu, (N, Z). Raises ValueError for another Z."""
        if mu.dim() != 2 or mu.shape[1] != self.latent_dim:
            raise ValueError(f"mu has shape {tuple(mu.shape)}, expected (rows, {self.latent_dim})")
        mu = mu.detach().double().cpu()
        rows = mu.shape[0]
        if rows == 0:
            return
        # Merge the deviations of this batch from its own mean with those of the rows before.
        total = self.count + rows
        mean = mu.mean(0)
        shift = mean - self.mean
        self.square += (mu - mean).square().sum(0) + shift.square() * self.count * rows / total
        self.mean += shift * rows / total
        self.count = total

    @property
    def variance(self) -> Tensor:
        """Divide by N-1 -> (Z,) fp64; zeros before the second row."""
        return self.square / (self.count - 1) if self.count > 1 else torch.zeros_like(self.square)

    @property
    def active_units(self) -> int:
        """Count the dimensions that vary by more than the threshold."""
        return count_active(self.variance, self.threshold)

    @property
    def active_unit_ratio(self) -> float:
        """Divide the active units by Z."""
        return self.active_units / self.latent_dim
