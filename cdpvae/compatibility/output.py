"""What a forward pass and a step's settings are in the original description.

Legend: B rows, L padded length, N target positions, Z latent, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from cdpvae.batch import PackedText, StepSchedule, Term, VAEBatch
from cdpvae.latents import Posterior
from cdpvae.loss import Gather
from cdpvae.models.text_vae import Decoded, LlamaSoftPromptVAE, ModelOutput
from cdpvae.models.text_vae.packing import Packing

if TYPE_CHECKING:
    from cdpvae.compatibility.loss import SoftPromptVAELoss


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


def forward(
    model: LlamaSoftPromptVAE,
    batch: VAEBatch,
    plan: StepPlan | StepSchedule | None = None,
    *,
    loss_fn: SoftPromptVAELoss | None = None,
    gather: Gather | None = None,
    seed: int = 0,
    return_logits: bool = False,
) -> VAEOutput:
    """Run one micro-batch and return the description's output.

    model, batch: what runs on what.
    plan: schedule of the step; see `LlamaSoftPromptVAE.forward`.
    loss_fn: computes the loss terms, where they are wanted.
    gather: rows of all ranks, None for local.
    seed: keys every random stream.
    return_logits: also make the padded logits and those of the bag of words.
    """
    # Run the live model.
    output = model(batch, schedule_of(plan), seed=seed)
    gaussian_code = isinstance(output.code, Posterior)
    # Compute the losses, and the logits that training never makes, where asked for.
    terms = None
    if loss_fn is not None:
        terms = _terms_of(model, batch, output, loss_fn, plan, gather)
    bow_logits = None
    if return_logits and model.bow_head is not None:
        bow_logits = model.bow_head(output.z.to(model.bow_head.weight.dtype))
    # Put everything into the description's fields.
    return VAEOutput(
        logits=padded_logits(model, output.decoded, batch.response) if return_logits else None,
        loss=None if terms is None else terms.total,
        z=output.z if gaussian_code else None,
        mu=output.code.mu if isinstance(output.code, Posterior) else None,
        logvar=output.code.logvar if isinstance(output.code, Posterior) else None,
        kl_loss=None if terms is None else terms.kl,
        recon_loss=None if terms is None else terms.recon,
        bow_logits=bow_logits,
        mu_augmented=output.view.mu if isinstance(output.view, Posterior) else None,
        terms=terms,
    )


def padded_logits(model: LlamaSoftPromptVAE, decoded: Decoded, response: PackedText) -> Tensor:
    """Return the decoder's logits (B, L, V), padded; position i predicts response token i+1."""
    hidden = decoded.hidden[decoded.positions]
    packing = Packing.of(response.cu_seqlens, hidden.shape[0], response.max_len)
    return F.linear(packing.pad(hidden), model.backbone.head_weight)


def _terms_of(
    model: LlamaSoftPromptVAE,
    batch: VAEBatch,
    output: ModelOutput,
    loss_fn: SoftPromptVAELoss,
    plan: StepPlan | StepSchedule | None,
    gather: Gather | None,
) -> LossTerms:
    """Call the description's loss on a forward pass."""
    code = output.code if isinstance(output.code, Posterior) else None
    head = model.bow_head
    return loss_fn(
        hidden=output.decoded.hidden,
        head_weight=model.backbone.head_weight,
        target_rows=output.decoded.positions[batch.target_positions],
        targets=batch.targets,
        posterior=code,
        z=None if code is None else output.z,
        bow_weight=None if head is None else head.weight,
        bow_bias=None if head is None else head.bias,
        response=batch.response,
        special_ids=model.no_content_ids,
        view=output.view if isinstance(output.view, Posterior) else None,
        plan=plan,
        gather=gather,
    )


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
