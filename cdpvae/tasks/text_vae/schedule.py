"""The schedule of every optimizer step: all that varies by step, the same on every rank."""

from __future__ import annotations

from cdpvae.batch import StepSchedule
from cdpvae.collapse import AdaptiveInterventionScheduler
from cdpvae.config import Settings
from cdpvae.data import StepBatch
from cdpvae.loss import CyclicalAnnealingSchedule
from cdpvae_kernels import Stream, philox


class Schedule:
    """Pure functions of the step, plus the weights that interventions have moved.

    total_steps: of the planned run. Raises ValueError when there are fewer than annealing cycles.
    """

    def __init__(
        self, settings: Settings, total_steps: int, interventions: AdaptiveInterventionScheduler
    ) -> None:
        self.settings = settings
        self.interventions = interventions
        loss = settings.loss
        self.beta = CyclicalAnnealingSchedule(
            total_steps, loss.beta_cycles, loss.beta_ramp_ratio, loss.beta_max
        )

    def __call__(self, step: int, step_batch: StepBatch) -> StepSchedule:
        """Return the schedule after `step` optimizer steps, for the data of the next one."""
        # Weights come from the settings, but for those that collapse control has moved.
        moved = self.interventions
        weights = {
            **self.settings.loss.weights,
            "bow": moved.bow_weight,
            "contrastive": moved.contrastive_weight,
        }
        return StepSchedule(
            step=step,
            epoch=step_batch.epoch,
            beta=self.beta(step),
            weights=weights,
            word_dropout=moved.word_dropout,
            target_divisor=float(step_batch.target_divisor),
            row_divisor=step_batch.row_divisor,
            with_view=self.with_view(step),
        )

    def with_view(self, step: int) -> bool:
        """Draw from (seed, step): every rank agrees, and so does a resumed run."""
        probability = self.settings.augmentation.augmentation_probability
        seed = self.settings.training.seed
        return float(philox.uniform(seed, Stream.STEP, step, 0, 0)) < probability
