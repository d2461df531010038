"""The schedule at steps computed by hand."""

import pytest

from cdpvae.loss import CyclicalAnnealingSchedule


def test_description_defaults():
    schedule = CyclicalAnnealingSchedule(80)
    # 4 cycles of 20 steps: 10 of ramp in tenths, 10 at 1.
    want = [step / 10 for step in range(10)] + [1.0] * 10
    assert [schedule(step) for step in range(80)] == pytest.approx(4 * want)


@pytest.mark.parametrize(
    "step, beta",
    [
        (0, 0.0),
        (1, 0.2 / 1.5),  # steps_per_cycle = 11 // 3 = 3, ramp_steps = 1.5
        (2, 0.2),
        (3, 0.0),  # the second cycle
        (4, 0.2 / 1.5),
        (8, 0.2),  # the last of three full cycles
        (9, 0.2),  # the remainder of 11 steps does not start a fourth
        (10, 0.2),
        (10_000, 0.2),
    ],
)
def test_odd_length(step, beta):
    schedule = CyclicalAnnealingSchedule(11, num_cycles=3, ratio=0.5, beta_max=0.2)
    assert schedule(step) == pytest.approx(beta)


def test_ratio_zero_never_ramps_and_one_never_holds():
    flat = CyclicalAnnealingSchedule(8, num_cycles=2, ratio=0.0, beta_max=0.7)
    assert [flat(step) for step in range(10)] == [0.7] * 10
    saw = CyclicalAnnealingSchedule(8, num_cycles=2, ratio=1.0)
    assert [saw(step) for step in range(9)] == [0, 0.25, 0.5, 0.75, 0, 0.25, 0.5, 0.75, 1.0]


def test_one_step_a_cycle_starts_at_zero():
    schedule = CyclicalAnnealingSchedule(4)
    assert [schedule(step) for step in range(5)] == [0, 0, 0, 0, 1]


def test_same_whatever_was_asked_before():
    schedule = CyclicalAnnealingSchedule(40)
    forward = [schedule(step) for step in range(45)]
    assert [schedule(step) for step in reversed(range(45))] == forward[::-1]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"total_steps": 3}, "total_steps=3 with num_cycles=4"),
        ({"total_steps": 9, "num_cycles": 0}, "num_cycles=0"),
        ({"total_steps": 9, "ratio": 1.5}, "ratio=1.5"),
        ({"total_steps": 9, "ratio": -0.1}, "ratio=-0.1"),
        ({"total_steps": 9, "ratio": float("nan")}, "ratio=nan"),
        ({"total_steps": 9, "beta_max": -1.0}, "beta_max=-1.0"),
        ({"total_steps": 9, "beta_max": float("inf")}, "beta_max=inf"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CyclicalAnnealingSchedule(**settings)


def test_negative_step_is_refused():
    with pytest.raises(ValueError, match="step=-1"):
        CyclicalAnnealingSchedule(8)(-1)
