"""Move beta, the weight of the KL, until the measured rate is what the user asked for.

A controller sees the rate of every step that was applied, unclamped, in nats per sequence and
averaged over all ranks, and says the beta of the next one. It is arithmetic on these numbers, so
every rank holds the same state, and a resumed run continues with it.

Both move slowly against what they control: the encoder follows beta over tens of steps, and a
multiplier that is faster than that swings around the target.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from cdpvae.config import LossConfig

# Where the weight starts, and how low a multiplier may fall, as shares of `beta_max`. The start is
# low because the decoder must first learn to read z, as in annealing.
START, LEAST = 0.01, 1e-4


class RateController(ABC):
    """Hold the rate at a target. Call it for the beta of the next step; it lies in its bounds.

    target: nats per sequence, above 0.
    beta_max: the most that beta may be, above 0.

    Raises ValueError for values outside these rules.
    """

    # Names of the numbers that are the controller's state.
    state: ClassVar[tuple[str, ...]]

    def __init__(self, target: float, beta_max: float) -> None:
        if not (math.isfinite(target) and target > 0):
            raise ValueError(f"rate_target={target}: it must be finite and above 0 nats")
        if not (math.isfinite(beta_max) and beta_max > 0):
            raise ValueError(f"beta_max={beta_max}: a controlled weight needs room above 0")
        self.target, self.beta_max = target, beta_max

    def __call__(self, step: int) -> float:
        """Return beta for the optimizer step that follows `step` steps taken."""
        return self.beta

    @property
    @abstractmethod
    def beta(self) -> float:
        """The weight from now on, in [0, beta_max]."""

    @abstractmethod
    def observe(self, rate: float) -> None:
        """Take in the rate of one step, nats per sequence."""

    def state_dict(self) -> dict[str, Any]:
        """Return the controller's numbers by name."""
        return {name: getattr(self, name) for name in self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there. Raises ValueError for the state of another control."""
        if state.keys() != set(self.state):
            raise ValueError(
                f"the saved rate control has {sorted(state)}, this one {sorted(self.state)}; "
                "resume with the rate_control of the saved run"
            )
        for name in self.state:
            setattr(self, name, state[name])


class LagrangeMultiplier(RateController):
    """Beta as the multiplier of the constraint rate <= target, by exponentiated gradient.

    Rezende & Viola 2018, "Taming VAEs", algorithm 1 (GECO), with the constraint on the rate instead
    of the reconstruction: beta <- beta * exp(gain * (average / target - 1)), the average being an
    exponential moving one of min(rate, 2 target). Early rates may be many times the target: cut,
    none moves beta by more than exp(gain) a step, or stays in the average for long.
    """

    GAIN: ClassVar[float] = 0.03
    SMOOTHING: ClassVar[float] = 0.9
    state: ClassVar[tuple[str, ...]] = ("log_beta", "average")

    def __init__(self, target: float, beta_max: float) -> None:
        super().__init__(target, beta_max)
        self.log_beta = math.log(START * beta_max)
        self.average: float | None = None

    @property
    def beta(self) -> float:
        """The multiplier, in [1e-4 beta_max, beta_max]."""
        return min(math.exp(self.log_beta), self.beta_max)

    def observe(self, rate: float) -> None:
        """Move the multiplier by the smoothed error."""
        rate = min(rate, 2 * self.target)
        before = rate if self.average is None else self.average
        self.average = self.SMOOTHING * before + (1 - self.SMOOTHING) * rate
        error = self.average / self.target - 1
        # Held in its bounds itself, so that no error is kept up beyond them.
        low, high = math.log(LEAST * self.beta_max), math.log(self.beta_max)
        self.log_beta = min(max(self.log_beta + self.GAIN * error, low), high)


class ProportionalIntegral(RateController):
    """Beta by PI control with a non-linear P term.

    Shao et al. 2020, "ControlVAE: Controllable Variational Autoencoder", section 4: with
    e = target - rate, beta = Kp / (1 + exp(e)) - Ki * sum of e, cut to [0, beta_max]. Here errors
    are relative to the target and gains to `beta_max`, so that they need no tuning for each. The
    paper keeps the integral as it is while beta is cut; here only what would drive it further out
    is left out, since a kept integral would never come back.
    """

    KP: ClassVar[float] = 0.01
    KI: ClassVar[float] = 0.003
    state: ClassVar[tuple[str, ...]] = ("integral", "proportional")

    def __init__(self, target: float, beta_max: float) -> None:
        super().__init__(target, beta_max)
        # Both as shares of beta_max.
        self.integral, self.proportional = START, 0.0

    @property
    def beta(self) -> float:
        """The sum of both terms, in [0, beta_max]."""
        return self.beta_max * min(max(self.proportional + self.integral, 0.0), 1.0)

    def observe(self, rate: float) -> None:
        """Compute both terms of the present error."""
        error = 1 - rate / self.target
        self.proportional = self.KP / (1 + math.exp(min(error, 1.0)))
        # A rate many times the target must not fill the integral in one step.
        change = -self.KI * min(max(error, -1.0), 1.0)
        total = self.proportional + self.integral
        if not (total >= 1 and change > 0) and not (total <= 0 and change < 0):
            self.integral = min(max(self.integral + change, -self.KP), 1.0)


CONTROLS: dict[str, type[RateController]] = {
    "lagrange": LagrangeMultiplier,
    "pi": ProportionalIntegral,
}


def build_rate_controller(loss: LossConfig) -> RateController | None:
    """Make the controller of the settings; None where beta is annealed."""
    if loss.rate_target is None:
        return None
    return CONTROLS[loss.rate_control](loss.rate_target, loss.beta_max)
