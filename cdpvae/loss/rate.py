"""The rate: KL(q(z|x) || p(z)), with free bits.

Free bits (Kingma et al. 2016, "Improved Variational Inference with Inverse Autoregressive Flow",
section 8 and appendix C.8) pay nothing for the KL to fall below a floor. To what the floor applies
differs between publications, so it is a choice:
- `dimension_batch`: to each dimension's mean over the rows of the global micro-batch, not of each
  rank's: otherwise the same rows would train differently on another number of ranks.
- `sample`: to each row's KL in each dimension; every row gets the floor, whatever the others have.
- `aggregate`: to the mean over rows of the sum over dimensions, the floor being free_bits x Z; the
  rate is free to sit in few dimensions.

Legend: B local rows, K rows of all ranks, Z latent dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor

from cdpvae.batch import Term
from cdpvae.config import LossConfig
from cdpvae.config.loss import FreeBitsVariant
from cdpvae.loss.base import Gather, LossInputs, LossTerm, StepContext, graph_if

FREE_BITS_VARIANTS = get_args(FreeBitsVariant)


@dataclass(frozen=True)
class RateTerms:
    """Nats. kl and kl_sum_clamped carry the graph, the others are detached.

    kl (): kl_sum_clamped / Z.
    kl_sum_clamped (): the sum over dimensions under the floor, per sequence.
    kl_raw (): sum over dimensions without the floor, per sequence.
    kl_per_dim (Z,): mean over rows without the floor.
    active_dims (): number of dimensions whose mean is above `free_bits`, in the others' dtype.
    """

    kl: Tensor
    kl_sum_clamped: Tensor
    kl_raw: Tensor
    kl_per_dim: Tensor
    active_dims: Tensor


def clamp_rate(
    rows_BZ: Tensor,
    free_bits: float,
    gather: Gather | None = None,
    variant: str = "dimension_batch",
) -> RateTerms:
    """Reduce the KL of each row and dimension (B, Z) under a floor of `free_bits` a dimension.

    rows_BZ: nats; (B,) where a family gives one number a row.
    free_bits: the floor.
    gather: rows of all ranks, see `base.py`; None means local.
    variant: to what the floor applies, see above.

    What is at or below the floor gets no gradient; means are over all gathered rows.
    """
    # A family may give one number a row.
    rows_BZ = rows_BZ.reshape(len(rows_BZ), -1)
    rows_KZ = rows_BZ if gather is None else gather(rows_BZ)
    mean_Z = rows_KZ.mean(dim=0)
    above_Z = mean_Z.detach() > free_bits
    if variant == "sample":
        clamped = _at_least(rows_KZ, free_bits).mean(dim=0).sum()
    elif variant == "aggregate":
        clamped = _at_least(mean_Z.sum(), free_bits * mean_Z.numel())
    else:
        clamped = _at_least(mean_Z, free_bits).sum()
    return RateTerms(
        kl=clamped / mean_Z.numel(),
        kl_sum_clamped=clamped,
        kl_raw=mean_Z.detach().sum(),
        kl_per_dim=mean_Z.detach(),
        active_dims=above_Z.sum().to(mean_Z.dtype),
    )


def _at_least(values: Tensor, floor: float) -> Tensor:
    """Return the values, and `floor` without a gradient where they are not above it."""
    # `where` and not `clamp`: clamp lets the gradient through at the floor itself.
    return torch.where(values.detach() > floor, values, values.new_full((), floor))


def check_free_bits(free_bits: float, variant: str = "dimension_batch") -> None:
    """Raise ValueError for a floor that is negative or infinite, or a variant that is not there."""
    if variant not in FREE_BITS_VARIANTS:
        raise ValueError(f"free_bits_variant={variant!r}: it must be one of {FREE_BITS_VARIANTS}")
    if not (math.isfinite(free_bits) and free_bits >= 0):
        raise ValueError(
            f"free_bits={free_bits}: the floor in nats per dimension must be finite and at "
            "least 0; 0 switches it off"
        )


class Rate(LossTerm):
    """The KL of whatever latent family has one, weighted by beta.

    free_bits: floor in nats per dimension.
    objective: under `per_token` the value is nats per latent dimension, so that beta weighs it
        against nats per target token: an effective ELBO beta of about beta x mean length / Z. Under
        `elbo` it is nats per sequence, beta = 1 being the ELBO with free bits.
    variant: to what the floor applies.
    reports_beta: writes beta beside the rate in every step, for a beta that is no function of it.

    Raises ValueError for a negative or infinite floor and for an unknown variant.
    """

    # A latent family without a KL has no rate.
    optional_columns: ClassVar[tuple[str, ...]] = ("kl", "kl_raw", "active_dims")

    def __init__(
        self,
        free_bits: float,
        objective: str,
        variant: str = "dimension_batch",
        reports_beta: bool = False,
    ) -> None:
        check_free_bits(free_bits, variant)
        self.free_bits, self.variant = free_bits, variant
        self.objective, self.reports_beta = objective, reports_beta

    @classmethod
    def of(cls, loss: LossConfig) -> Rate:
        """Make the term of the settings."""
        return cls(
            loss.free_bits,
            loss.objective,
            loss.free_bits_variant,
            reports_beta=loss.rate_target is not None,
        )

    def __call__(self, inputs: LossInputs, step: StepContext) -> list[Term]:
        """Return `kl` with `kl_raw`, `active_dims` and `kl_per_dim`; nothing without a KL."""
        # Only families with a rate have this term.
        rows = inputs.penalties.get("kl")
        if rows is None:
            return []
        beta = step.schedule.beta
        with graph_if(beta):
            rate = clamp_rate(rows, self.free_bits, step.gather, self.variant)
        dims = rate.kl_per_dim.numel()
        # Reported without the floor, so that the floor can be seen to work.
        report = {
            "kl_raw": rate.kl_raw,
            "active_dims": rate.active_dims,
            "kl_per_dim": rate.kl_per_dim,
        }
        if self.reports_beta:
            report["beta"] = rate.kl_raw.new_full((), beta)
        weight = beta * (dims if self.objective == "elbo" else 1)
        return [Term(name="kl", value=rate.kl, weight=weight, per="row", report=report)]
