"""The module that DeepSpeed wraps: encoder pass, decoder pass and loss in one forward."""

from __future__ import annotations

from torch import nn

from cdpvae.batch import StepPlan, VAEBatch
from cdpvae.loss import SoftPromptVAELoss
from cdpvae.models.text_vae import LlamaSoftPromptVAE, VAEOutput
from cdpvae.training.distributed import gather_rows


class TrainingModule(nn.Module):
    """What the engine wraps: one micro-batch in, `VAEOutput` with its loss terms out."""

    def __init__(
        self, model: LlamaSoftPromptVAE, loss_fn: SoftPromptVAELoss, seed: int, world_size: int
    ):
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn
        self.seed = seed
        self.gather = gather_rows if world_size > 1 else None

    def forward(self, batch: VAEBatch, plan: StepPlan) -> VAEOutput:
        return self.model(batch, plan, loss_fn=self.loss_fn, gather=self.gather, seed=self.seed)
