"""The plan of every optimizer step: all that varies by step, the same on every rank."""

from __future__ import annotations

from cdpvae.batch import StepPlan
from cdpvae.collapse import AdaptiveInterventionScheduler
from cdpvae.config import Settings
from cdpvae.loss import CyclicalAnnealingSchedule
from cdpvae_kernels import philox


class Planner:
    """Pure functions of the step, plus the weights that interventions have moved."""

    def __init__(
        self, settings: Settings, total_steps: int, interventions: AdaptiveInterventionScheduler
    ):
        """Raises ValueError when there are fewer steps than annealing cycles."""
        self.settings = settings
        self.interventions = interventions
        loss = settings.loss
        self.beta = CyclicalAnnealingSchedule(
            total_steps, loss.beta_cycles, loss.beta_ramp_ratio, loss.beta_max
        )

    def plan(
        self, step: int, epoch: int, target_divisor: float, row_divisor: int | None = None
    ) -> StepPlan:
        """step: optimizer steps taken so far. The divisors: see `StepPlan`."""
        weights = self.interventions
        return StepPlan(
            step=step,
            epoch=epoch,
            beta=self.beta(step),
            bow_weight=weights.bow_weight,
            contrastive_weight=weights.contrastive_weight,
            word_dropout=weights.word_dropout,
            target_divisor=float(target_divisor),
            with_view=self.with_view(step),
            row_divisor=row_divisor,
        )

    def with_view(self, step: int) -> bool:
        """Drawn from (seed, step): every rank agrees, and so does a resumed run."""
        probability = self.settings.augmentation.augmentation_probability
        seed = self.settings.training.seed
        return float(philox.uniform(seed, philox.Stream.STEP, step, 0, 0)) < probability
