"""What a forward pass and a step's settings are in the original description.

Legend: B rows, L padded length, N target positions, Z latent, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cdpvae.batch import StepSchedule, Term


@dataclass
class LossTerms:
    """Scalars (fp32) unless said otherwise; None for a term that was not computed.

    total: what backward starts from. recon: nats per target token. kl: after free bits, divided
    by Z. kl_raw: nats per sequence, summed over dimensions. kl_per_dim: (Z,) nats.
    recon_nats_per_sequence, neg_elbo: nats per sequence. mi_bound: log K - infonce; mi_cap: log K.
    row_weight: what a mean over the rows of this micro-batch weighs in the mean over micro-batches
    that makes it a mean over the rows of the step; 1 where all have the same number of rows.
    """

    total: Tensor
    recon: Tensor
    kl: Tensor
    kl_raw: Tensor
    bow: Tensor
    infonce: Tensor | None
    kl_per_dim: Tensor
    active_dims: Tensor
    recon_nats_per_sequence: Tensor
    neg_elbo: Tensor
    mi_bound: Tensor | None
    mi_cap: Tensor | None
    row_weight: float = 1.0

    def __post_init__(self) -> None:
        """Start without the objective's terms, which are no field of the description's."""
        self.parts: list[Term] = []


@dataclass
class VAEOutput:
    """The description's output; `None` where it was not asked for or does not exist.

    logits: (B, L, V) padded, only on request; position i predicts response token i+1.
    loss, kl_loss, recon_loss: scalars, when a loss function was given. z, mu, logvar: (B, Z) fp32.
    bow_logits: (B, V), only on request. mu_augmented: (B, Z). terms: all loss terms.
    """

    logits: Tensor | None = None
    loss: Tensor | None = None
    z: Tensor | None = None
    mu: Tensor | None = None
    logvar: Tensor | None = None
    kl_loss: Tensor | None = None
    recon_loss: Tensor | None = None
    bow_logits: Tensor | None = None
    mu_augmented: Tensor | None = None
    terms: LossTerms | None = None


@dataclass(frozen=True)
class StepPlan:
    """The description's schedule of a step: a `StepSchedule` whose two weights have names.

    bow_weight, contrastive_weight: of the bag of words and of InfoNCE; the other fields are those
    of `StepSchedule`.
    """

    step: int
    epoch: int
    beta: float
    bow_weight: float
    contrastive_weight: float
    word_dropout: float
    target_divisor: float
    with_view: bool
    row_divisor: int | None = None

    def to_schedule(self) -> StepSchedule:
        """Return what the live model and objective take."""
        return StepSchedule(
            step=self.step,
            epoch=self.epoch,
            beta=self.beta,
            weights={"bow": self.bow_weight, "contrastive": self.contrastive_weight},
            word_dropout=self.word_dropout,
            target_divisor=self.target_divisor,
            row_divisor=self.row_divisor,
            with_view=self.with_view,
        )


def schedule_of(plan: StepPlan | StepSchedule | None) -> StepSchedule | None:
    """Return the live schedule of a plan, of a schedule itself, or None."""
    return plan.to_schedule() if isinstance(plan, StepPlan) else plan
