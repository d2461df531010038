"""The standard normal prior N(0, I).

Legend: B rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cdpvae.latents.noise import Noise


@dataclass(frozen=True)
class StandardNormal:
    """N(0, I) over z of `shape`."""

    shape: tuple[int, ...]

    def sample(self, num_rows: int, noise: Noise) -> Tensor:
        """Draw z (num_rows, *shape), fp32."""
        return noise.normal(num_rows, self.shape)

    def log_prob(self, z: Tensor) -> Tensor:
        """Return log N(z; 0, I) of z (B, *shape) -> (B,) nats, at least fp32."""
        flat = z.flatten(1).to(torch.promote_types(z.dtype, torch.float32))
        return -0.5 * (flat.square().sum(1) + flat.shape[1] * math.log(2 * math.pi))
