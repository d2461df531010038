"""Cyclical annealing of beta, the weight of the KL term.

Fu et al. 2019, "Cyclical Annealing Schedule: A Simple Approach to Mitigating KL Vanishing": each
cycle ramps beta from 0 and then holds it, so that z is learned to be used anew while the KL costs
nothing. A pure function of the step: nothing to save, the same on every rank and after a resume.
"""

from __future__ import annotations

import math


class CyclicalAnnealingSchedule:
    """beta(step) = beta_max * min(1, cycle_pos / (steps_per_cycle * ratio)).

    total_steps: optimizer steps of the run. steps_per_cycle = total_steps // num_cycles; steps
    after the last full cycle stay at beta_max. ratio: share of a cycle that ramps; 0 is beta_max
    throughout, 1 never holds. beta_max: at least 0.
    Raises ValueError for values outside these rules and for total_steps < num_cycles.
    """

    def __init__(
        self,
        total_steps: int,
        num_cycles: int = 4,
        ratio: float = 0.5,
        beta_max: float = 1.0,
    ) -> None:
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
        self.total_steps = total_steps
        self.num_cycles = num_cycles
        self.ratio = ratio
        self.beta_max = beta_max
        self.steps_per_cycle = total_steps // num_cycles

    def __call__(self, step: int) -> float:
        """beta for the optimizer step that follows `step` steps taken (0 for the first).

        Raises ValueError for a negative step.
        """
        if step < 0:
            raise ValueError(f"step={step}: it counts optimizer steps taken, from 0")
        if step >= self.steps_per_cycle * self.num_cycles:
            return self.beta_max
        cycle_pos = step % self.steps_per_cycle
        ramp_steps = self.steps_per_cycle * self.ratio
        if cycle_pos < ramp_steps:
            return self.beta_max * (cycle_pos / ramp_steps)
        return self.beta_max
