"""Anneal beta, the weight of the KL term, in cycles.

Fu et al. 2019, "Cyclical Annealing Schedule: A Simple Approach to Mitigating KL Vanishing": each
cycle ramps beta from 0 and then holds it, so that z is learned to be used anew while the KL costs
nothing. A pure function of the step: nothing to save, the same on every rank and after a resume.
"""

from __future__ import annotations

import math

from cdpvae.config import LossConfig

# The original description's API has the values of the settings as defaults.
DEFAULT = LossConfig()


class CyclicalAnnealingSchedule:
    """Compute beta(step) = beta_max * min(1, cycle_pos / (steps_per_cycle * ratio)).

    total_steps: optimizer steps of the run.
    num_cycles: a cycle has total_steps // num_cycles steps; steps after the last full cycle stay
    at beta_max.
    ratio: share of a cycle that ramps; 0 is beta_max throughout, 1 never holds.
    beta_max: at least 0.

    Raises ValueError for values outside these rules and for total_steps < num_cycles.
    """

    def __init__(
        self,
        total_steps: int,
        num_cycles: int = DEFAULT.beta_cycles,
        ratio: float = DEFAULT.beta_ramp_ratio,
        beta_max: float = DEFAULT.beta_max,
    ) -> None:
        # Refuse values without a meaning.
        if num_cycles < 1:
            raise ValueError(f"num_cycles={num_cycles}: at least one cycle is needed")
        if total_steps < num_cycles:
            raise ValueError(
                f"total_steps={total_steps} with num_cycles={num_cycles}: every cycle needs a "
                "step; train longer or lower num_cycles"
            )
        if not 0.0 <= ratio <= 1.0:
            raise ValueError(f"ratio={ratio}: the share of a cycle that ramps lies in [0, 1]")
        if not (math.isfinite(beta_max) and beta_max >= 0):
            raise ValueError(f"beta_max={beta_max}: it must be finite and at least 0")

        # Cut the run into cycles of whole steps.
        self.total_steps = total_steps
        self.num_cycles = num_cycles
        self.ratio = ratio
        self.beta_max = beta_max
        self.steps_per_cycle = total_steps // num_cycles

    def __call__(self, step: int) -> float:
        """Compute beta for the optimizer step that follows `step` steps taken (0 for the first).

        Raises ValueError for a negative step.
        """
        if step < 0:
            raise ValueError(f"step={step}: it counts optimizer steps taken, from 0")
        if step >= self.steps_per_cycle * self.num_cycles:
            return self.beta_max
        # Ramp in the first `ratio` of the cycle, then hold.
        cycle_pos = step % self.steps_per_cycle
        ramp_steps = self.steps_per_cycle * self.ratio
        if cycle_pos < ramp_steps:
            return self.beta_max * (cycle_pos / ramp_steps)
        return self.beta_max
