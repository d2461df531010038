"""The loss of the original description: called with keywords, giving `LossTerms`.

Legend: B rows, L padded length, T packed positions, N target positions, Z latent, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cdpvae.batch import PackedText, StepSchedule, Term, sum_of
from cdpvae.compatibility.output import LossTerms, StepPlan, schedule_of
from cdpvae.config import LossConfig
from cdpvae.latents import Posterior, gaussian
from cdpvae.loss import (
    BagOfWords,
    Contrastive,
    Gather,
    LossInputs,
    Objective,
    Rate,
    RateTerms,
    Reconstruction,
    clamp_rate,
)
from cdpvae.loss import InfoNCELoss as Contrast
from cdpvae.loss import MomentumQueue as Queue
from cdpvae.loss.rate import check_free_bits
from cdpvae.loss.reconstruction import IGNORE_INDEX, OBJECTIVES
from cdpvae_kernels import check_range, has_values

LOSS = LossConfig()


class _Head(NamedTuple):
    """The bag-of-words head as two tensors."""

    weight: Tensor
    bias: Tensor


class SoftPromptVAELoss:
    """The objective, called with keywords and giving `LossTerms`.

    latent_dim: Z.
    free_bits: nats per dimension.
    loss_scale: "per_token" or "elbo", the setting `loss.objective`.
    bow_reduction: "bce" or "categorical"; at a vocabulary of 128K the former is nearly inert, see
        `loss/bow.py`.
    bow_loss_weight, contrastive_weight, and beta (1.0 at first): plain attributes to set; they
        count when a call has no plan, which brings its own.
    temperature, normalize, queue_size: of InfoNCE and its queue.
    micro_batches_per_step: grad_accum x world_size.
    impl: passed on to `cdpvae_kernels`.

    Raises ValueError for values outside their rules.
    """

    def __init__(
        self,
        *,
        latent_dim: int,
        free_bits: float = LOSS.free_bits,
        loss_scale: str = LOSS.objective,
        bow_reduction: str = LOSS.bow_reduction,
        bow_loss_weight: float = LOSS.bow_weight,
        contrastive_weight: float = LOSS.contrastive_weight,
        temperature: float = LOSS.temperature,
        normalize: bool = LOSS.normalize_latents,
        queue_size: int = LOSS.queue_size,
        micro_batches_per_step: int = 1,
        impl: str | None = None,
    ) -> None:
        if latent_dim < 1:
            raise ValueError(f"latent_dim={latent_dim}: at least one dimension is needed")
        if loss_scale not in OBJECTIVES:
            raise ValueError(f"loss_scale={loss_scale!r}: it must be one of {OBJECTIVES}")
        # Refuse what no objective can be made of, under the names of this interface.
        _check_weight("bow_loss_weight", bow_loss_weight)
        _check_weight("contrastive_weight", contrastive_weight)
        self.latent_dim = latent_dim
        self.bow_loss_weight = bow_loss_weight
        self.contrastive_weight = contrastive_weight
        self.beta = 1.0
        # The live objective does the work.
        self.objective = Objective(
            [
                Reconstruction(loss_scale, impl),
                Rate(free_bits, loss_scale),
                BagOfWords(bow_reduction, impl),
                Contrastive(Contrast(temperature, normalize), Queue(queue_size, dim=latent_dim)),
            ],
            micro_batches_per_step,
        )

    @property
    def queue(self) -> Queue:
        """The queue of past positives."""
        return self._contrastive.queue

    @property
    def _contrastive(self) -> Contrastive:
        found = next(term for term in self.objective.terms if isinstance(term, Contrastive))
        return found

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
        plan: StepPlan | StepSchedule | None = None,
        gather: Gather | None = None,
    ) -> LossTerms:
        """Compute the loss of one micro-batch.

        hidden (T, D): the packed decoder output.
        head_weight (V, D): the output head.
        target_rows (N,) int64: positions of `hidden` that predict.
        targets (N,) int64: what they predict; -100 is ignored.
        posterior: of the B rows; None (then z, bow_weight, bow_bias and view are None as well)
            leaves the reconstruction alone, and KL and BoW are reported as 0.
        z (B, Z): a sample.
        bow_weight (V, Z), bow_bias (V,): the bag-of-words head.
        response: B rows of the decoder's text.
        special_ids (S,) int64: no content for BoW.
        view: posterior of the augmented texts; without it there is no InfoNCE.
        plan: weights and divisor of the step; without it the attributes count and the divisor is
            the number of valid targets here.
        gather: rows of all ranks, None for local.

        In the result recon, kl, bow and infonce carry the graph unless their weight is exactly 0:
        such a term is reported and otherwise left out. neg_elbo takes one sample z.
        With gradients enabled, the positives then enter the queue.
        Raises ValueError for inputs that do not fit together.
        """
        # Refuse what does not fit together.
        self._check(posterior, z, bow_weight, bow_bias, view)
        head = None
        if bow_weight is not None and bow_bias is not None:
            head = _Head(bow_weight, bow_bias)
        rows = response.num_rows
        none = hidden.new_zeros((rows, 0))
        # Call the live objective.
        terms = self.objective(
            LossInputs(
                hidden=hidden,
                head_weight=head_weight,
                positions=target_rows,
                targets=targets,
                response=response,
                special_ids=special_ids,
                z=none if z is None else z,
                anchor=none if posterior is None else posterior.mu,
                penalties={} if posterior is None else _penalties(posterior),
                view=None if view is None else view.mu,
                bow_head=head,
            ),
            schedule_of(plan) or self._plan(targets).to_schedule(),
            gather,
        )
        return self._loss_terms(terms)

    def _plan(self, targets: Tensor) -> StepPlan:
        """Return the schedule of a call without one."""
        # Without data (shape propagation) the number of valid targets is unknown.
        valid = targets.numel()
        if has_values(targets):
            valid = int((targets != IGNORE_INDEX).sum())
        return StepPlan(
            step=0,
            epoch=0,
            beta=self.beta,
            bow_weight=self.bow_loss_weight,
            contrastive_weight=self.contrastive_weight,
            word_dropout=0.0,
            target_divisor=float(max(valid, 1) * self.objective.micro_batches_per_step),
            with_view=True,
        )

    def _loss_terms(self, terms: list[Term]) -> LossTerms:
        """Put the objective's terms into the description's fields."""
        # Terms that a model without a latent does not have are reported as 0.
        by_name = {term.name: term for term in terms}
        total = sum_of(terms)
        zero = total.new_zeros(())
        kl, infonce = by_name.get("kl"), by_name.get("infonce")
        per_sequence = by_name["recon_nats_per_sequence"]
        report: Mapping[str, Tensor] = {} if kl is None else kl.report
        bounds: Mapping[str, Tensor] = {} if infonce is None else infonce.report
        found = LossTerms(
            total=total,
            recon=by_name["recon"].value,
            kl=zero if kl is None else kl.value,
            kl_raw=report.get("kl_raw", zero),
            bow=by_name["bow"].value if "bow" in by_name else zero,
            infonce=None if infonce is None else infonce.value,
            kl_per_dim=report.get("kl_per_dim", total.new_zeros(self.latent_dim)),
            active_dims=report.get("active_dims", zero),
            recon_nats_per_sequence=per_sequence.value.detach(),
            neg_elbo=by_name["neg_elbo"].value,
            mi_bound=bounds.get("mi_bound"),
            mi_cap=bounds.get("mi_cap"),
            row_weight=per_sequence.share,
        )
        found.parts = terms
        return found

    def weighted_terms(
        self, terms: LossTerms, plan: StepPlan | StepSchedule | None = None
    ) -> dict[str, Tensor]:
        """Return recon, kl, bow and, where computed, infonce as they enter `terms.total`.

        A term with weight 0 is a zero without a graph (`requires_grad` is False), so ask before
        differentiating.
        """
        names = ("recon", "recon_nats_per_sequence", "kl", "bow", "infonce")
        # Of the two forms of the reconstruction, the one that is trained on counts.
        parts = {term.name: term for term in terms.parts if term.name in names}
        per_sequence = parts.pop("recon_nats_per_sequence")
        if per_sequence.weight:
            parts["recon"] = per_sequence
        return {name: term.weighted for name, term in parts.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the queue; the rest is settings."""
        return self.queue.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the queue of a checkpoint. Raises ValueError when it does not fit."""
        self.queue.load_state_dict(state)

    def _check(
        self,
        posterior: Posterior | None,
        z: Tensor | None,
        bow_weight: Tensor | None,
        bow_bias: Tensor | None,
        view: Posterior | None,
    ) -> None:
        """Raise ValueError for inputs of which some are missing, or of another dimension."""
        latent = {"posterior": posterior, "z": z, "bow_weight": bow_weight, "bow_bias": bow_bias}
        # What belongs to the latent is given whole or not at all.
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
    """Raise ValueError for a weight that is negative or infinite."""
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"{name}={weight}: it must be finite and at least 0; 0 switches it off")


def _penalties(posterior: Posterior) -> dict[str, Tensor]:
    return {"kl": gaussian.kl_per_row_dim(posterior.mu, posterior.logvar)}


class FreeBitsKL:
    """The KL term on mu and logvar. free_bits: floor in nats per dimension; 0 switches it off.

    Raises ValueError for a negative or infinite floor.
    """

    def __init__(self, free_bits: float = LOSS.free_bits) -> None:
        check_free_bits(free_bits)
        self.free_bits = free_bits

    def __call__(self, mu_BZ: Tensor, logvar_BZ: Tensor, gather: Gather | None = None) -> RateTerms:
        """Reduce the KL of mu and logvar, each (B, Z); `loss.rate.clamp_rate`."""
        rows = gaussian.kl_per_row_dim(mu_BZ, logvar_BZ)
        return clamp_rate(rows, self.free_bits, gather)


class InfoNCELoss(Contrast):
    """InfoNCE with the description's defaults."""

    def __init__(
        self, temperature: float = LOSS.temperature, normalize: bool = LOSS.normalize_latents
    ) -> None:
        super().__init__(temperature, normalize)


class MomentumQueue(Queue):
    """The queue with the description's default size."""

    def __init__(self, size: int = LOSS.queue_size, *, dim: int) -> None:
        super().__init__(size, dim=dim)


def compute_bow_loss(bow_logits: Tensor, target_ids: Tensor) -> Tensor:
    """Compute the "bce" bag-of-words loss in its padded form: logits and targets held dense.

    bow_logits (B, V) float. target_ids (B, L) int64: -100 ignored; repeats count once.
    Returns a scalar in nats, fp32 (fp64 for fp64 logits); 0 for an empty batch. Special tokens are
    the caller's: whatever is not -100 is in the bag.
    Raises ValueError for wrong shapes and for ids outside the vocabulary.
    """
    shapes = bow_logits.dim() == 2 and target_ids.dim() == 2
    if not shapes or bow_logits.shape[0] != target_ids.shape[0]:
        raise ValueError(
            f"bow_logits {tuple(bow_logits.shape)} must be (batch, vocabulary) and target_ids "
            f"{tuple(target_ids.shape)} (batch, length), of the same batch"
        )
    # Mark the tokens that occur, then compare with every logit.
    logits_BV = bow_logits.to(torch.promote_types(bow_logits.dtype, torch.float32))
    valid_BL = target_ids != IGNORE_INDEX
    ids = target_ids[valid_BL]
    check_range(f"target_ids ({IGNORE_INDEX} is ignored)", ids, 0, logits_BV.shape[1])
    present_BV = torch.zeros_like(logits_BV)
    present_BV[valid_BL.nonzero(as_tuple=True)[0], ids] = 1.0
    total = F.binary_cross_entropy_with_logits(logits_BV, present_BV, reduction="sum")
    return total / max(logits_BV.numel(), 1)
