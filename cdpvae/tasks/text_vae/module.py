"""The module that DeepSpeed wraps: encoder pass, decoder pass and losses in one forward."""

from __future__ import annotations

from torch import nn

from cdpvae.batch import StepOutput, StepSchedule, Term, VAEBatch
from cdpvae.loss import LossInputs, Objective
from cdpvae.models.text_vae import LlamaSoftPromptVAE, ModelOutput
from cdpvae.training.distributed import gather_rows


class TrainingModule(nn.Module):
    """One micro-batch in, its loss terms out.

    model: runs encoder and decoder.
    objective: computes the terms.
    seed: of the run; keys every random stream.
    world_size: with more than one rank, means over rows gather those of all ranks.
    """

    def __init__(
        self, model: LlamaSoftPromptVAE, objective: Objective, seed: int, world_size: int
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.seed = seed
        self.gather = gather_rows if world_size > 1 else None

    def forward(self, batch: VAEBatch, schedule: StepSchedule) -> StepOutput:
        """Return the terms of a micro-batch; observed are the code's tensors."""
        output = self.model(batch, schedule, seed=self.seed)
        inputs = loss_inputs(self.model, batch, output)
        terms = self.terms(inputs, schedule)
        point = self.model.latent.gradient_point(output.code)
        return StepOutput(terms, output.code.detach().tensors(), point)

    def terms(self, inputs: LossInputs, schedule: StepSchedule) -> list[Term]:
        """Compute the objective's terms, with the rows of all ranks where a term needs them."""
        return self.objective(inputs, schedule, self.gather)


def loss_inputs(model: LlamaSoftPromptVAE, batch: VAEBatch, output: ModelOutput) -> LossInputs:
    """Bring together what the losses read of a forward pass."""
    # A code is only asked for vectors and penalties, whatever its family.
    latent = model.latent
    return LossInputs(
        hidden=output.decoded.hidden,
        head_weight=model.backbone.head_weight,
        positions=output.decoded.positions[batch.target_positions],
        targets=batch.targets,
        ignore_index=None,
        response=batch.response,
        special_ids=model.no_content_ids,
        z=output.z.flatten(1),
        anchor=latent.flat(output.code),
        penalties=latent.penalties(output.code),
        view=None if output.view is None else latent.flat(output.view),
        bow_head=model.bow_head,
        predicted=output.decoded.predicted,
        predicted_positions=batch.target_positions,
    )
