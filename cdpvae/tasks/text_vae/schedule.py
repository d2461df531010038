"""The schedule of every optimizer step: all that varies by step, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable

from cdpvae.batch import StepSchedule
from cdpvae.collapse import AdaptiveInterventionScheduler
from cdpvae.config import Settings
from cdpvae.data import StepBatch
from cdpvae.loss import CyclicalAnnealingSchedule, build_rate_controller
from cdpvae_kernels import Stream, philox


class Schedule:
    """Pure functions of the step, plus the weights that interventions and rate control moved.

    settings: of the run.
    total_steps: of the planned run.
    interventions: holds the weights that collapse control moves.

    Raises ValueError when beta is annealed and there are fewer steps than cycles.
    """

    def __init__(
        self, settings: Settings, total_steps: int, interventions: AdaptiveInterventionScheduler
    ) -> None:
        self.settings = settings
        self.total_steps = total_steps
        self.interventions = interventions
        self.rate_control = build_rate_controller(settings.loss)
        self.beta: Callable[[int], float] = self.rate_control or _annealed(settings, total_steps)

    def __call__(self, step: int, step_batch: StepBatch) -> StepSchedule:
        """Return the schedule after `step` optimizer steps, for the data of the next one."""
        # Weights come from the settings, but for those that collapse control has moved.
        moved = self.interventions
        weights = {
            **self.settings.loss.weights,
            "bow": moved.bow_weight,
            "contrastive": moved.contrastive_weight,
            "order": self.order_weight(step),
        }
        return StepSchedule(
            step=step,
            epoch=step_batch.epoch,
            beta=self.beta(step),
            weights=weights,
            word_dropout=self.word_dropout(step),
            target_divisor=float(step_batch.target_divisor),
            row_divisor=step_batch.row_divisor,
            with_view=self.with_view(step),
        )

    def word_dropout(self, step: int) -> float:
        """Return the share of words dropped: it falls to the setting, or to where it was moved."""
        loss, last = self.settings.loss, self.interventions.word_dropout
        if loss.word_dropout_start is None:
            return last
        return last + (loss.word_dropout_start - last) * self._left(
            loss.word_dropout_fall_ratio, step
        )

    def order_weight(self, step: int) -> float:
        """Return the weight of the order term, which may fall to 0."""
        loss = self.settings.loss
        left = 1.0 if loss.order_fall_ratio is None else self._left(loss.order_fall_ratio, step)
        return loss.order_weight * left

    def _left(self, ratio: float, step: int) -> float:
        """Return what is left of 1 that falls linearly to 0 over a share of the run."""
        return max(0.0, 1 - step / (ratio * self.total_steps))

    def with_view(self, step: int) -> bool:
        """Draw from (seed, step): every rank agrees, and so does a resumed run."""
        probability = self.settings.augmentation.augmentation_probability
        seed = self.settings.training.seed
        return float(philox.uniform(seed, Stream.STEP, step, 0, 0)) < probability


def _annealed(settings: Settings, total_steps: int) -> Callable[[int], float]:
    """Return beta as a function of the step. Raises ValueError for fewer steps than cycles."""
    # Without a weight, and so without a latent, there are no cycles that a short run would lack.
    loss = settings.loss
    if loss.beta_max == 0:
        return lambda step: 0.0
    if total_steps < loss.beta_cycles:
        raise ValueError(
            f"beta_cycles={loss.beta_cycles} in a run of {total_steps} steps: every cycle needs a "
            "step; train longer or lower beta_cycles"
        )
    return CyclicalAnnealingSchedule(
        total_steps, loss.beta_cycles, loss.beta_ramp_ratio, loss.beta_max
    )
