"""The training objective: reconstruction + beta x KL + bag of words + InfoNCE.

The losses know no ranks. What they need of the other ranks comes through `gather`, a callable
that takes local rows (B, ...) and returns the rows of all ranks (K, ...), concatenated in rank
order and differentiable; None means local. The convention: every rank computes the same scalar
from the gathered rows, and the engine averages gradients over ranks. So the backward of `gather`
hands each rank its own slice of the incoming gradient times world_size; the average over ranks
then is the gradient of that scalar, as on a single rank that holds all rows.

The engine averages over micro-batches (accumulation x ranks) as well, while the reconstruction is
a mean over *all* target tokens of the optimizer step. Each micro-batch therefore contributes
token_sum x micro_batches_per_step / target_divisor, and the average of these contributions is
exactly that mean, however the window is cut. KL, BoW and InfoNCE are means over the rows of a
global micro-batch. Under `batching: tokens` these have different numbers of rows, and each mean is
weighted by rows x micro_batches_per_step / row_divisor, so that the step's average is over rows
(every rank has the same number of rows in a global micro-batch). The floor of the KL and the
candidates of InfoNCE remain those of the global micro-batch.

`loss_scale` sets what the KL weighs against. "per_token", the description's: nats per target
token against nats per latent dimension, an effective ELBO beta of about beta x mean length / Z.
"elbo": nats per sequence against nats per sequence, beta = 1 being the ELBO with free bits.

Legend: B rows, T packed positions, N target positions, D hidden, V vocabulary, Z latent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cdpvae.batch import LossTerms, PackedText, Posterior, StepPlan
from cdpvae.loss.bow import bow_loss, check_bow_reduction
from cdpvae.loss.contrastive import InfoNCELoss, InfoNCETerms, MomentumQueue
from cdpvae.loss.rate import FreeBitsKL, KLTerms
from cdpvae.loss.reconstruction import IGNORE_INDEX, reconstruction_nll

LOSS_SCALES = ("per_token", "elbo")


class Weights(NamedTuple):
    """The weights of one step."""

    beta: float
    bow: float
    contrastive: float


class SoftPromptVAELoss:
    """All terms of the objective, and the queue of past positives.

    latent_dim: Z. free_bits: nats per dimension. loss_scale: "per_token" or "elbo", see above.
    bow_reduction: "bce" or "categorical"; at a vocabulary of 128K the former is nearly inert, see
    `bow.py`. bow_loss_weight, contrastive_weight and beta (1.0 at first) are plain attributes to
    set; they count when a call has no `StepPlan`, which brings its own.
    temperature, normalize: of InfoNCE. queue_size: rows of the queue. micro_batches_per_step:
    grad_accum x world_size. impl: passed on to `cdpvae_kernels`.
    Raises ValueError for values outside their rules.
    """

    def __init__(
        self,
        *,
        latent_dim: int,
        free_bits: float = 0.5,
        loss_scale: str = "per_token",
        bow_reduction: str = "bce",
        bow_loss_weight: float = 1.5,
        contrastive_weight: float = 0.1,
        temperature: float = 0.07,
        normalize: bool = True,
        queue_size: int = 0,
        micro_batches_per_step: int = 1,
        impl: str | None = None,
    ) -> None:
        if latent_dim < 1:
            raise ValueError(f"latent_dim={latent_dim}: at least one dimension is needed")
        if loss_scale not in LOSS_SCALES:
            raise ValueError(f"loss_scale={loss_scale!r}: it must be one of {LOSS_SCALES}")
        if micro_batches_per_step < 1:
            raise ValueError(
                f"micro_batches_per_step={micro_batches_per_step}: it is grad_accum x world_size "
                "and at least 1"
            )
        check_bow_reduction(bow_reduction)
        _check_weight("bow_loss_weight", bow_loss_weight)
        _check_weight("contrastive_weight", contrastive_weight)
        self.latent_dim = latent_dim
        self.loss_scale = loss_scale
        self.bow_reduction = bow_reduction
        self.bow_loss_weight = bow_loss_weight
        self.contrastive_weight = contrastive_weight
        self.beta = 1.0
        self.micro_batches_per_step = micro_batches_per_step
        self.impl = impl
        self.free_bits_kl = FreeBitsKL(free_bits)
        self.infonce = InfoNCELoss(temperature, normalize)
        self.queue = MomentumQueue(queue_size, dim=latent_dim)

    def __call__(
        self,
        *,
        hidden: Tensor,
        head_weight: Tensor,
        target_rows: Tensor,
        targets: Tensor,
        posterior: Posterior | None,
        z: Tensor | None,
        bow_weight: Tensor | None,
        bow_bias: Tensor | None,
        response: PackedText,
        special_ids: Tensor,
        view: Posterior | None = None,
        plan: StepPlan | None = None,
        gather: Callable[[Tensor], Tensor] | None = None,
    ) -> LossTerms:
        """The loss of one micro-batch.

        hidden: (T, D), the packed decoder output. head_weight: (V, D). target_rows: (N,) int64,
        rows of `hidden` that predict. targets: (N,) int64, -100 ignored.
        posterior: of the B rows; None (then z, bow_weight, bow_bias and view are None as well)
        leaves the reconstruction alone, and KL and BoW are reported as 0. z: (B, Z), a sample.
        bow_weight: (V, Z). bow_bias: (V,). response: B rows of the decoder's text. special_ids:
        (S,) int64, no content for BoW. view: posterior of the augmented texts; without it there
        is no InfoNCE. plan: weights and divisor of the step; without it the attributes count and
        the divisor is the number of valid targets here.

        In the result recon, kl, bow and infonce carry the graph unless their weight is exactly 0:
        such a term is reported and otherwise left out. neg_elbo takes one sample z.
        With gradients enabled, the positives then enter the queue.
        Raises ValueError for inputs that do not fit together.
        """
        self._check(posterior, z, bow_weight, bow_bias, view)
        weights = self._weights(plan)
        token_sum = reconstruction_nll(hidden, head_weight, target_rows, targets, impl=self.impl)
        recon = self._per_token(token_sum, targets, plan)
        per_sequence = token_sum / response.num_rows
        row_weight = self._row_weight(response.num_rows, plan)
        kl = self._kl(posterior, weights, gather, token_sum)
        bow = token_sum.new_zeros(())
        if z is not None:
            with _graph_if(weights.bow):
                bow = bow_loss(
                    z,
                    bow_weight,
                    bow_bias,
                    response,
                    special_ids,
                    self.bow_reduction,
                    impl=self.impl,
                )
        contrast = self._contrast(posterior, view, weights, gather)
        infonce = None if contrast is None else contrast.loss
        main = per_sequence if self.loss_scale == "elbo" else recon
        nats = per_sequence.detach()
        return LossTerms(
            total=sum(self._weigh(main, kl.kl, bow, infonce, weights, row_weight).values()),
            recon=recon,
            kl=kl.kl,
            kl_raw=kl.kl_raw,
            bow=bow,
            infonce=infonce,
            kl_per_dim=kl.kl_per_dim,
            active_dims=kl.active_dims,
            recon_nats_per_sequence=nats,
            neg_elbo=nats + kl.kl_raw,
            mi_bound=None if contrast is None else contrast.mi_bound,
            mi_cap=None if contrast is None else contrast.mi_cap,
            row_weight=row_weight,
        )

    def weighted_terms(self, terms: LossTerms, plan: StepPlan | None = None) -> dict[str, Tensor]:
        """recon, kl, bow and, where computed, infonce as they enter `terms.total`.

        terms: what a call with the same `plan` returned. A term with weight 0 is a zero without
        a graph (`requires_grad` is False), so ask before differentiating.
        """
        recon = terms.recon
        if self.loss_scale == "elbo":
            # Rows and divisor of the batch are in the ratio of the two reported forms. Without
            # targets both are 0, and so is the gradient.
            per_token = recon.detach()
            ratio = terms.recon_nats_per_sequence / per_token
            recon = recon * torch.where(per_token == 0, 0.0, ratio)
        return self._weigh(
            recon, terms.kl, terms.bow, terms.infonce, self._weights(plan), terms.row_weight
        )

    def state_dict(self) -> dict[str, int | Tensor]:
        """The state of the queue; the rest is settings."""
        return self.queue.state_dict()

    def load_state_dict(self, state: dict[str, int | Tensor]) -> None:
        """Take over the queue of a checkpoint; ValueError when it does not fit."""
        self.queue.load_state_dict(state)

    def _weights(self, plan: StepPlan | None) -> Weights:
        if plan is None:
            return Weights(self.beta, self.bow_loss_weight, self.contrastive_weight)
        return Weights(plan.beta, plan.bow_weight, plan.contrastive_weight)

    def _per_token(self, token_sum: Tensor, targets: Tensor, plan: StepPlan | None) -> Tensor:
        # At least 1: a count of 0 comes with a sum of 0, and 0 / 0 would be NaN.
        if plan is None:
            return token_sum / (targets != IGNORE_INDEX).sum().clamp(min=1)
        return token_sum * (self.micro_batches_per_step / max(plan.target_divisor, 1.0))

    def _row_weight(self, num_rows: int, plan: StepPlan | None) -> float:
        """`LossTerms.row_weight` of a micro-batch of `num_rows` rows on this rank."""
        if plan is None or plan.row_divisor is None:
            return 1.0
        return num_rows * self.micro_batches_per_step / plan.row_divisor

    def _kl(
        self,
        posterior: Posterior | None,
        weights: Weights,
        gather: Callable[[Tensor], Tensor] | None,
        like: Tensor,
    ) -> KLTerms:
        if posterior is None:
            zero = like.new_zeros(())
            return KLTerms(zero, zero, zero, like.new_zeros(self.latent_dim), zero)
        with _graph_if(weights.beta):
            return self.free_bits_kl(posterior.mu, posterior.logvar, gather)

    def _contrast(
        self,
        posterior: Posterior | None,
        view: Posterior | None,
        weights: Weights,
        gather: Callable[[Tensor], Tensor] | None,
    ) -> InfoNCETerms | None:
        if view is None:
            return None
        with _graph_if(weights.contrastive):
            terms = self.infonce(posterior.mu, view.mu, self.queue.rows(), gather)
        if torch.is_grad_enabled():
            self.queue.push(terms.positives)
        return terms

    def _weigh(
        self,
        recon: Tensor,
        kl: Tensor,
        bow: Tensor,
        infonce: Tensor | None,
        weights: Weights,
        row_weight: float,
    ) -> dict[str, Tensor]:
        elbo = self.loss_scale == "elbo"
        kl_weight = weights.beta * (self.latent_dim if elbo else 1)
        # Per token, `recon` is divided by the tokens of the step already.
        weighted = {"recon": recon * row_weight if elbo and row_weight != 1 else recon}
        weighted["kl"] = _weighted(kl, kl_weight * row_weight)
        weighted["bow"] = _weighted(bow, weights.bow * row_weight)
        if infonce is not None:
            weighted["infonce"] = _weighted(infonce, weights.contrastive * row_weight)
        return weighted

    def _check(
        self,
        posterior: Posterior | None,
        z: Tensor | None,
        bow_weight: Tensor | None,
        bow_bias: Tensor | None,
        view: Posterior | None,
    ) -> None:
        latent = {"posterior": posterior, "z": z, "bow_weight": bow_weight, "bow_bias": bow_bias}
        missing = [name for name, value in latent.items() if value is None]
        if missing and len(missing) < len(latent):
            raise ValueError(
                f"{', '.join(missing)} missing: {', '.join(latent)} are given together, or all "
                "None for a model without a latent"
            )
        if posterior is None and view is not None:
            raise ValueError("a view without a posterior: InfoNCE compares the two")
        if posterior is not None and posterior.mu.shape[-1] != self.latent_dim:
            raise ValueError(
                f"the posterior has {posterior.mu.shape[-1]} dimensions, the loss was made for "
                f"latent_dim={self.latent_dim}"
            )


def _check_weight(name: str, weight: float) -> None:
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"{name}={weight}: it must be finite and at least 0; 0 switches it off")


def _graph_if(weight: float) -> torch.set_grad_enabled:
    """A context that records a graph only for a term that has a weight."""
    return torch.set_grad_enabled(torch.is_grad_enabled() and weight != 0)


def _weighted(term: Tensor, weight: float) -> Tensor:
    # Not 0 * term: that would carry an infinite term into the total as NaN.
    return weight * term if weight != 0 else torch.zeros_like(term.detach())
