"""A forward pass with the original description's output: losses, logits on request.

Legend: B rows, L padded length, V vocabulary.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cdpvae.batch import PackedText, StepSchedule, VAEBatch
from cdpvae.compatibility.loss import SoftPromptVAELoss
from cdpvae.compatibility.output import LossTerms, StepPlan, VAEOutput, schedule_of
from cdpvae.latents import Posterior
from cdpvae.loss import Gather
from cdpvae.models.text_vae import Decoded, LlamaSoftPromptVAE, ModelOutput
from cdpvae.models.text_vae.packing import Packing


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
