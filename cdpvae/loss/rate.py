"""The rate: KL(q(z|x) || p(z)), with free bits per dimension.

Free bits (Kingma et al. 2016, "Improved Variational Inference with Inverse Autoregressive Flow",
section 8 and appendix C.8) pay nothing for a dimension to fall below a floor. The floor applies
to the mean over the rows of the global micro-batch, not to each row or to each rank's mean:
otherwise the same rows would train differently on another number of ranks.

Legend: B local rows, K rows of all ranks, Z latent dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cdpvae.batch import Term
from cdpvae.loss.base import Gather, LossInputs, LossTerm, StepContext, graph_if


@dataclass(frozen=True)
class RateTerms:
    """Nats. kl and kl_sum_clamped carry the graph, the others are detached.

    kl (): kl_sum_clamped / Z.
    kl_sum_clamped (): sum over dimensions of max(free_bits, KL_d).
    kl_raw (): sum over dimensions without the floor, per sequence.
    kl_per_dim (Z,): mean over rows without the floor.
    active_dims (): number of dimensions above the floor, in the dtype of the others.
    """

    kl: Tensor
    kl_sum_clamped: Tensor
    kl_raw: Tensor
    kl_per_dim: Tensor
    active_dims: Tensor


def clamp_rate(rows_BZ: Tensor, free_bits: float, gather: Gather | None = None) -> RateTerms:
    """Reduce the KL of each row and dimension (B, Z) under a floor of `free_bits` a dimension.

    gather: rows of all ranks, see `base.py`; None means local. A dimension at or below the floor
    gets no gradient, and which ones those are is decided on the mean over all gathered rows.
    """
    # A family may give one number a row.
    rows_BZ = rows_BZ.reshape(len(rows_BZ), -1)
    rows_KZ = rows_BZ if gather is None else gather(rows_BZ)
    mean_Z = rows_KZ.mean(dim=0)
    # `where` and not `clamp`: clamp lets the gradient through at the floor itself.
    above_Z = mean_Z.detach() > free_bits
    clamped = torch.where(above_Z, mean_Z, mean_Z.new_full((), free_bits)).sum()
    return RateTerms(
        kl=clamped / mean_Z.numel(),
        kl_sum_clamped=clamped,
        kl_raw=mean_Z.detach().sum(),
        kl_per_dim=mean_Z.detach(),
        active_dims=above_Z.sum().to(mean_Z.dtype),
    )


def check_free_bits(free_bits: float) -> None:
    """Raise ValueError for a floor that is negative or infinite."""
    if not (math.isfinite(free_bits) and free_bits >= 0):
        raise ValueError(
            f"free_bits={free_bits}: the floor in nats per dimension must be finite and at "
            "least 0; 0 switches it off"
        )


class Rate(LossTerm):
    """The KL of whatever latent family has one, weighted by beta.

    free_bits: floor in nats per dimension. objective: under `per_token` the value is nats per
    latent dimension, so that beta weighs it against nats per target token: an effective ELBO beta
    of about beta x mean length / Z. Under `elbo` it is nats per sequence, beta = 1 being the ELBO
    with free bits. Raises ValueError for a negative or infinite floor.
    """

    # A latent family without a KL has no rate.
    optional_columns: ClassVar[tuple[str, ...]] = ("kl", "kl_raw", "active_dims")

    def __init__(self, free_bits: float, objective: str) -> None:
        check_free_bits(free_bits)
        self.free_bits = free_bits
        self.objective = objective

    def __call__(self, inputs: LossInputs, step: StepContext) -> list[Term]:
        """Return `kl` with `kl_raw`, `active_dims` and `kl_per_dim`; nothing without a KL."""
        # Only families with a rate have this term.
        rows = inputs.penalties.get("kl")
        if rows is None:
            return []
        beta = step.schedule.beta
        with graph_if(beta):
            rate = clamp_rate(rows, self.free_bits, step.gather)
        dims = rate.kl_per_dim.numel()
        # Reported without the floor, so that the floor can be seen to work.
        report = {
            "kl_raw": rate.kl_raw,
            "active_dims": rate.active_dims,
            "kl_per_dim": rate.kl_per_dim,
        }
        weight = beta * (dims if self.objective == "elbo" else 1)
        return [Term(name="kl", value=rate.kl, weight=weight, per="row", report=report)]
