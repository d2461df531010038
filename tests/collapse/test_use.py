"""The use of z: paired arithmetic, its window, and the table of levels that follows from it."""

import dataclasses
import math

import pytest
import torch

from cdpvae.collapse import AdaptiveInterventionScheduler, CollapseMonitor, Level, Use, UseWindow
from cdpvae.config import CollapseConfig
from cdpvae.latents import Posterior, gaussian

Z, STEPS = 4, 300
CONFIG = CollapseConfig(
    watch_use=True, use_window_rows=256, patience=1, check_every=20, window_rows=512
)


class Family:
    """The Gaussian without a network."""

    code_type = Posterior

    def health(self, code, *, seed, active_variance):
        return gaussian.health(code, seed=seed, active_variance=active_variance)


def posterior(is_healthy: bool) -> Posterior:
    """400 codes: all units used, or the prior."""
    mu = torch.randn(400, Z, generator=torch.Generator().manual_seed(0))
    if is_healthy:
        return Posterior(mu, torch.full((400, Z), -3.0))
    return Posterior(torch.zeros(400, Z), torch.zeros(400, Z))


def window(mean: float, kl: float = 0.0, spread: float = 0.01, rows: int = 256, **settings):
    """A full window with the given mean, and a standard deviation of about `spread`."""
    config = CONFIG.model_copy(update=settings)
    use = UseWindow(config, held_out_rows=1000, total_steps=STEPS)
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(rows // 2)
    use.add(mean + spread * signs, torch.full((rows,), kl))
    return use


def checked(use: UseWindow | None, is_healthy: bool, step: int = STEPS, config=CONFIG):
    monitor = CollapseMonitor(Family(), config, use)
    monitor.add(posterior(is_healthy))
    return monitor.check(step)


# min_use is 0.3 as the KL spent is 0: 0.1 is low, 0.5 is below twice, 0.7 is not.
TABLE = [
    # use, posterior healthy, level, moves weights up, relaxes them
    (0.1, False, Level.SEVERE, True, False),
    (0.1, True, Level.MODERATE, True, False),
    (0.5, False, Level.MILD, True, False),
    (0.5, True, Level.NONE, False, True),
    (0.7, False, Level.MILD, False, True),
    (0.7, True, Level.NONE, False, True),
]


@pytest.mark.parametrize(("mean", "is_healthy", "level", "pushes", "relaxes"), TABLE)
def test_levels_by_use_and_indicators(mean, is_healthy, level, pushes, relaxes):
    found = checked(window(mean), is_healthy)
    assert bool(found.indicators) is not is_healthy
    assert (found.level, found.is_collapsing, found.is_healthy) == (level, pushes, relaxes)


@pytest.mark.parametrize(("is_healthy", "level"), [(False, Level.MILD), (True, Level.NONE)])
@pytest.mark.parametrize("mean", [0.0, 0.5, 9.0])
def test_nothing_fires_in_the_grace_period_or_before_the_window_is_full(mean, is_healthy, level):
    """The original rules call the same posterior severe."""
    for use, step in ((window(mean), STEPS // 3), (window(mean, rows=254), STEPS)):
        found = checked(use, is_healthy, step)
        assert found.use is not None and not found.use.counts
        assert (found.level, found.is_collapsing) == (level, False)
        if not is_healthy:
            assert not found.is_healthy, "nothing is known by which weights could relax"
    if not is_healthy:
        assert checked(None, is_healthy).level == Level.SEVERE


def test_grace_ends_after_the_share_of_the_plan():
    use = window(0.0)
    assert use.grace_steps == 100
    assert [use.judge(step).counts for step in (100, 101)] == [False, True]
    assert window(0.0, grace_ratio=0.1).grace_steps == 30
    with pytest.raises(ValueError, match="grace_ratio"):
        CollapseConfig(grace_ratio=0.4)


def test_the_error_is_that_of_paired_rows():
    generator = torch.Generator().manual_seed(3)
    hard = 50 * torch.rand(256, generator=generator, dtype=torch.float64)
    gain = 0.2 + 0.4 * torch.randn(256, generator=generator, dtype=torch.float64)
    use = UseWindow(CONFIG, held_out_rows=1000, total_steps=STEPS)
    use.add((hard + gain) - hard, torch.full((256,), 2.0))
    found = use.judge(STEPS)
    assert found.mean == pytest.approx(float(gain.mean()))
    assert found.standard_error == pytest.approx(float(gain.std()) / 16)
    assert found.upper_limit == pytest.approx(found.mean + 1.96 * found.standard_error)
    # Of unpaired rows it would be forty times that, and nothing would ever be low.
    assert found.standard_error < float(hard.std()) / 16 / 20
    assert found.is_low


def test_the_upper_limit_decides_not_the_mean():
    """A mean of 0.2 below 0.3: certain with a narrow interval, open with a wide one."""
    narrow, wide = window(0.2, spread=0.7), window(0.2, spread=0.95)
    assert narrow.judge(STEPS).upper_limit == pytest.approx(0.2 + 1.96 * 0.7 / 16, abs=1e-3)
    assert narrow.judge(STEPS).is_low and not wide.judge(STEPS).is_low


def test_what_is_spent_sets_the_least_use():
    assert window(1.0, kl=2.0).judge(STEPS).min_use == 0.3
    spent = window(1.0, kl=32.0).judge(STEPS)
    assert spent.min_use == pytest.approx(3.2) and spent.is_low
    assert not window(1.0, kl=8.0).judge(STEPS).is_low
    assert window(1.0, kl=8.0, min_use_share=0.5).judge(STEPS).min_use == 4.0


def test_rows_met_again_do_not_narrow_the_interval():
    """Twenty rows measured thirteen times are evidence of twenty rows."""
    use = UseWindow(CONFIG, held_out_rows=20, total_steps=STEPS)
    values = torch.linspace(-1, 1, 20, dtype=torch.float64)
    for _ in range(13):
        use.add(values, torch.zeros(20))
    found = use.judge(STEPS)
    assert found.rows == 256 and found.counts
    assert found.standard_error == pytest.approx(float(use.differences.std()) / math.sqrt(20))


def test_the_window_rotates_and_keeps_the_last_rows():
    use = UseWindow(CONFIG, held_out_rows=100, total_steps=STEPS)
    starts = []
    for number in range(20):
        starts.append(use.next_row)
        use.add(torch.full((16,), float(number)), torch.zeros(16))
    assert starts[:8] == [0, 16, 32, 48, 64, 80, 96, 12]
    assert len(use.differences) == 256 and use.differences.min() == 4
    assert use.first_judged_step(16) == 320 and use.first_judged_step(128) == 120


def test_values_that_are_not_finite_fire_nothing():
    use = window(0.0)
    use.add(torch.tensor([math.nan, math.inf]), torch.zeros(2))
    found = checked(use, is_healthy=True)
    assert (found.level, found.is_collapsing) == (Level.NONE, False)


def test_the_state_continues_exactly():
    first = CollapseMonitor(Family(), CONFIG, window(0.1, kl=3.0))
    first.add(posterior(True))
    first.check(STEPS)
    second = CollapseMonitor(Family(), CONFIG, UseWindow(CONFIG, 1000, STEPS))
    second.load_state_dict(first.state_dict())
    assert second.use is not None and second.use.next_row == 256
    for monitor in (first, second):
        monitor.use.add(torch.linspace(0, 1, 16), torch.ones(16))
    assert first.check(STEPS) == second.check(STEPS)
    assert first.in_a_row == 2


def test_a_state_without_the_use_starts_afresh_and_the_other_way_is_refused():
    old, new = CollapseMonitor(Family(), CONFIG), CollapseMonitor(Family(), CONFIG, window(0.1))
    assert "use" not in old.state_dict(), "a run that does not watch saves what it always saved"
    fresh = CollapseMonitor(Family(), CONFIG, UseWindow(CONFIG, 1000, STEPS))
    fresh.load_state_dict(old.state_dict())
    assert len(fresh.use.differences) == 0
    with pytest.raises(ValueError, match="eval_rows above 0"):
        old.load_state_dict(new.state_dict())


def test_weights_relax_while_z_is_well_used():
    """Few active units do not hold the weights where an earlier collapse has put them."""
    scheduler = AdaptiveInterventionScheduler(1.5, 0.1, 0.4, CONFIG)
    scheduler.intervene(checked(window(0.0), is_healthy=False))
    pushed = scheduler.bow_weight
    assert pushed == 3.0
    # Neither open nor young checks move them.
    scheduler.intervene(checked(window(9.0), is_healthy=False, step=1))
    assert scheduler.bow_weight == pushed
    scheduler.intervene(checked(window(9.0), is_healthy=False))
    assert 1.5 < scheduler.bow_weight < pushed


def test_patience_counts_only_checks_that_count():
    config = CONFIG.model_copy(update={"patience": 2})
    use = window(0.0)
    monitor = CollapseMonitor(Family(), config, use)
    monitor.add(posterior(False))
    # Two checks in the grace period do not add up with the first one after it.
    found = [monitor.check(step).is_collapsing for step in (80, 100, 120, 140)]
    assert found == [False, False, False, True]


def test_figures_are_logged_under_their_names():
    use = Use(mean=1.0, standard_error=0.5, kl=4.0, min_use=0.4, rows=256, counts=True)
    assert use.figures() == {
        "use": 1.0,
        "use_upper_limit": 1.98,
        "use_kl": 4.0,
        "min_use": 0.4,
        "use_rows": 256.0,
        "use_counts": 1.0,
    }
    assert "not judged" in str(dataclasses.replace(use, counts=False))
