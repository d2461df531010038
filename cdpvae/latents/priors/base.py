"""The interface of a prior.

Legend: B rows.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from cdpvae.latents.noise import Noise


class Prior(Protocol):
    """p(z) over z of one shape."""

    def sample(self, num_rows: int, noise: Noise) -> Tensor:
        """Draw z (num_rows, *shape), fp32."""
        ...

    def log_prob(self, z: Tensor) -> Tensor:
        """Return log p(z) of z (B, *shape) -> (B,) nats, in the dtype of z and at least fp32."""
        ...
