"""KL divergence of a diagonal Gaussian posterior from N(0, I), with free bits per dimension.

Free bits (Kingma et al. 2016, "Improved Variational Inference with Inverse Autoregressive Flow",
section 8 and appendix C.8) pay nothing for a dimension to fall below a floor. The floor applies
to the mean over the rows of the global micro-batch, not to each row or to each rank's mean:
otherwise the same rows would train differently on another number of ranks.

Legend: B local rows, K rows of all ranks, Z latent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KLTerms:
    """Nats. kl and kl_sum_clamped carry the graph, the others are detached.

    kl: (), kl_sum_clamped / Z. kl_sum_clamped: (), sum over dimensions of max(free_bits, KL_d).
    kl_raw: (), sum over dimensions without the floor, per sequence.
    kl_per_dim: (Z,), mean over rows without the floor.
    active_dims: (), number of dimensions above the floor, in the dtype of the others.
    """

    kl: Tensor
    kl_sum_clamped: Tensor
    kl_raw: Tensor
    kl_per_dim: Tensor
    active_dims: Tensor


def kl_per_row_dim(mu_BZ: Tensor, logvar_BZ: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)) for each row and dimension, in nats.

    mu_BZ, logvar_BZ: (B, Z) float. -> (B, Z) fp32, whatever the inputs (fp64 for fp64 inputs).
    Raises ValueError when the shapes differ or are not (B, Z).
    """
    if mu_BZ.dim() != 2 or mu_BZ.shape != logvar_BZ.shape:
        raise ValueError(
            f"mu {tuple(mu_BZ.shape)} and logvar {tuple(logvar_BZ.shape)} must both be "
            "(batch, latent_dim)"
        )
    dtype = torch.promote_types(mu_BZ.dtype, torch.float32)
    mu, logvar = mu_BZ.to(dtype), logvar_BZ.to(dtype)
    return 0.5 * (mu.square() + logvar.exp() - 1.0 - logvar)


class FreeBitsKL:
    """The KL term. free_bits: floor in nats per dimension; 0 switches it off.

    Raises ValueError for a negative or infinite floor.
    """

    def __init__(self, free_bits: float = 0.5) -> None:
        if not (math.isfinite(free_bits) and free_bits >= 0):
            raise ValueError(
                f"free_bits={free_bits}: the floor in nats per dimension must be finite and at "
                "least 0; 0 switches it off"
            )
        self.free_bits = free_bits

    def __call__(
        self,
        mu_BZ: Tensor,
        logvar_BZ: Tensor,
        gather: Callable[[Tensor], Tensor] | None = None,
    ) -> KLTerms:
        """mu_BZ, logvar_BZ: (B, Z). gather: rows of all ranks, see `elbo.py`; None means local.

        A dimension at or below the floor gets no gradient, and which ones those are is decided on
        the mean over all gathered rows.
        """
        rows_KZ = kl_per_row_dim(mu_BZ, logvar_BZ)
        if gather is not None:
            rows_KZ = gather(rows_KZ)
        mean_Z = rows_KZ.mean(dim=0)
        # `where` and not `clamp`: clamp lets the gradient through at the floor itself.
        above_Z = mean_Z.detach() > self.free_bits
        clamped = torch.where(above_Z, mean_Z, mean_Z.new_full((), self.free_bits)).sum()
        return KLTerms(
            kl=clamped / mean_Z.numel(),
            kl_sum_clamped=clamped,
            kl_raw=mean_Z.detach().sum(),
            kl_per_dim=mean_Z.detach(),
            active_dims=above_Z.sum().to(mean_Z.dtype),
        )
