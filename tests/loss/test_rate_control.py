"""A controller brings a simulated rate to its target, stays in its bounds, and keeps its state.

The plant is a rate that falls with beta, follows it slowly as an encoder does, and is noisy.
"""

from __future__ import annotations

import math
import random

import pytest

from cdpvae.config import LossConfig
from cdpvae.loss import LagrangeMultiplier, ProportionalIntegral, build_rate_controller
from cdpvae.loss.rate_control import LEAST

CONTROLS = [LagrangeMultiplier, ProportionalIntegral]
STEPS, TAIL = 2000, 400


class Plant:
    """rate -> scale / (1 + beta / half), a twentieth of the way a step, with noise of 15 %."""

    def __init__(self, scale: float = 30.0, half: float = 0.05, seed: int = 0) -> None:
        self.scale, self.half, self.draw = scale, half, random.Random(seed)
        self.rate = scale

    def step(self, beta: float) -> float:
        self.rate += (self.scale / (1 + beta / self.half) - self.rate) / 20
        return max(0.0, self.rate * self.draw.gauss(1, 0.15))


def run(controller, plant: Plant, steps: int = STEPS) -> tuple[list[float], list[float]]:
    """Betas and rates of a run; beta stays in its bounds in every step."""
    betas, rates = [], []
    for step in range(steps):
        beta = controller(step)
        assert 0 <= beta <= controller.beta_max and beta == controller.beta
        betas.append(beta)
        plant_rate = plant.step(beta)
        rates.append(plant.rate)
        controller.observe(plant_rate)
    return betas, rates


def tail_mean(values: list[float]) -> float:
    return sum(values[-TAIL:]) / TAIL


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("target", [3.0, 8.0, 20.0])
@pytest.mark.parametrize("control", CONTROLS)
def test_reaches_its_target(control, target, seed):
    controller, plant = control(target, 1.0), Plant(seed=seed)
    betas, rates = run(controller, plant)
    assert rates[0] > 1.4 * target
    assert tail_mean(rates) == pytest.approx(target, rel=0.1)
    # The weight is what the plant needs, not a bound: beta = half (scale / target - 1).
    assert tail_mean(betas) == pytest.approx(0.05 * (30 / target - 1), rel=0.15)
    # It settles, where a multiplier faster than the plant would swing.
    assert max(abs(rate / target - 1) for rate in rates[-TAIL:]) < 0.3


@pytest.mark.parametrize("control", CONTROLS)
def test_stays_in_its_bounds_and_comes_back_from_them(control):
    """A target out of reach drives beta to a bound; once it can be met, beta leaves at once."""
    for beta_max, rate, bound in ((0.2, 1e6, 0.2), (0.2, 0.0, 0.0)):
        controller = control(5.0, beta_max)
        for _ in range(STEPS):
            controller.observe(rate)
        assert controller.beta == pytest.approx(bound, abs=2 * LEAST * beta_max)
        before = controller.beta
        # No error is kept up beyond the bound: 60 steps the other way move it clearly.
        for _ in range(60):
            controller.observe(0.0 if rate else 1e6)
        moved = before - controller.beta if rate else controller.beta - before
        assert moved > 1e-5 * beta_max and abs(moved) > 0.1 * before


def test_multiplier_is_exponentiated_gradient_on_a_moving_average():
    controller = LagrangeMultiplier(4.0, 2.0)
    assert controller.beta == pytest.approx(0.02)
    controller.observe(6.0)
    assert controller.average == 6.0
    assert controller.beta == pytest.approx(0.02 * math.exp(0.03 * 0.5))
    controller.observe(2.0)
    # 0.9 * 6 + 0.1 * 2 = 5.6: the average is still above the target.
    assert controller.beta == pytest.approx(0.02 * math.exp(0.03 * (0.5 + 0.4)))
    # A rate out of all proportion counts as twice the target: 0.9 * 5.6 + 0.1 * 8 = 5.84.
    controller.observe(1e9)
    assert controller.beta == pytest.approx(0.02 * math.exp(0.03 * (0.5 + 0.4 + 0.46)))


def test_pi_control_is_the_papers_two_terms():
    controller = ProportionalIntegral(4.0, 2.0)
    assert controller.beta == pytest.approx(0.02)
    controller.observe(6.0)
    # e = (4 - 6) / 4: P = 0.01 / (1 + exp(e)), I grows by 0.003 x 0.5.
    p = 0.01 / (1 + math.exp(-0.5))
    assert controller.beta == pytest.approx(2 * (p + 0.01 + 0.0015))
    controller.observe(2.0)
    p = 0.01 / (1 + math.exp(0.5))
    assert controller.beta == pytest.approx(2 * (p + 0.01 + 0.0015 - 0.0015))


@pytest.mark.parametrize("control", CONTROLS)
def test_continues_from_its_state(control):
    controller, plant = control(8.0, 1.0), Plant()
    run(controller, plant, 300)
    restored = control(8.0, 1.0)
    assert restored.beta != controller.beta
    restored.load_state_dict(controller.state_dict())
    for rate in (12.0, 3.0, 9.0, 8.5):
        assert restored.beta == controller.beta
        restored.observe(rate)
        controller.observe(rate)
    assert restored.state_dict() == controller.state_dict()


def test_state_of_the_other_control_is_refused():
    with pytest.raises(ValueError, match="rate_control of the saved run"):
        LagrangeMultiplier(1.0, 1.0).load_state_dict(ProportionalIntegral(1.0, 1.0).state_dict())


@pytest.mark.parametrize(
    ("target", "beta_max", "message"),
    [
        (0.0, 1.0, "rate_target=0.0"),
        (math.inf, 1.0, "rate_target=inf"),
        (1.0, 0.0, "beta_max=0.0"),
    ],
)
def test_senseless_numbers_are_refused(target, beta_max, message):
    with pytest.raises(ValueError, match=message):
        LagrangeMultiplier(target, beta_max)


def test_settings_choose_the_control():
    assert build_rate_controller(LossConfig()) is None
    for kind, control in (("lagrange", LagrangeMultiplier), ("pi", ProportionalIntegral)):
        loss = LossConfig(free_bits=0.0, rate_target=7.0, rate_control=kind, beta_max=0.5)
        made = build_rate_controller(loss)
        assert type(made) is control and (made.target, made.beta_max) == (7.0, 0.5)
