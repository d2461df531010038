"""What each level does to the weights, and that nothing ever passes a bound or a default."""

import random

import pytest
import torch

from cdpvae import AdaptiveInterventionScheduler
from cdpvae.collapse import CollapseMetrics, Level
from cdpvae.config import CollapseConfig

NAMES = ("bow_weight", "contrastive_weight", "word_dropout")


def metrics(level, confirmed=True):
    level = Level(level)
    return CollapseMetrics(level=level, is_collapsing=confirmed and level > 0)


def values(scheduler):
    return [getattr(scheduler, name) for name in NAMES]


@pytest.mark.parametrize(
    "level, expected",
    [
        (Level.NONE, [1.5, 0.1, 0.4]),
        (Level.MILD, [1.65, 0.11, 0.4]),
        (Level.MODERATE, [1.95, 0.13, 0.32]),
        (Level.SEVERE, [3.0, 0.5, 0.1]),
    ],
)
def test_each_level_once_from_the_defaults(level, expected):
    scheduler = AdaptiveInterventionScheduler()
    intervention = scheduler.intervene(metrics(level))
    assert values(scheduler) == pytest.approx(expected)
    assert [intervention[name] for name in NAMES] == values(scheduler)
    assert intervention.level == level


def test_factors_compound_check_by_check_up_to_the_bounds():
    scheduler = AdaptiveInterventionScheduler()
    scheduler.intervene(metrics(2))
    scheduler.intervene(metrics(2))
    assert values(scheduler) == pytest.approx([1.5 * 1.69, 0.169, 0.256])
    for _ in range(20):
        scheduler.intervene(metrics(2))
    assert values(scheduler) == [3.0, 0.5, 0.1]


def test_a_level_not_confirmed_by_patience_holds():
    scheduler = AdaptiveInterventionScheduler()
    scheduler.intervene(metrics(2))
    before = values(scheduler)
    for level in (1, 2, 3):
        intervention = scheduler.intervene(metrics(level, confirmed=False))
        assert values(scheduler) == before and intervention.level == level


def test_relaxation_goes_a_share_of_the_way_back():
    scheduler = AdaptiveInterventionScheduler()
    scheduler.intervene(metrics(3))
    scheduler.intervene(metrics(0))
    assert values(scheduler) == pytest.approx([3.0 - 0.15, 0.5 - 0.04, 0.1 + 0.03])
    for _ in range(500):
        scheduler.intervene(metrics(0))
    assert values(scheduler) == pytest.approx([1.5, 0.1, 0.4], rel=1e-12)


@pytest.mark.parametrize("rate, expected", [(0.0, [3.0, 0.5, 0.1]), (1.0, [1.5, 0.1, 0.4])])
def test_relaxation_of_nothing_and_of_everything(rate, expected):
    scheduler = AdaptiveInterventionScheduler(config=CollapseConfig(relaxation_rate=rate))
    scheduler.intervene(metrics(3))
    scheduler.intervene(metrics(0))
    assert values(scheduler) == pytest.approx(expected)


# Ordinary defaults; each default beyond its own bound; everything switched off.
@pytest.mark.parametrize("start", [(1.5, 0.1, 0.4), (4.0, 0.7, 0.05), (0.0, 0.0, 0.0)])
@pytest.mark.parametrize("seed", range(5))
def test_no_sequence_of_levels_passes_a_bound_or_a_default(start, seed):
    scheduler = AdaptiveInterventionScheduler(*start)
    draw = random.Random(seed)
    bow = (start[0], max(3.0, start[0])) if start[0] else (0.0, 0.0)
    contrastive = (start[1], max(0.5, start[1])) if start[1] else (0.0, 0.0)
    dropout = (min(0.1, start[2]), start[2])
    for _ in range(300):
        level = draw.choice((0, 0, 1, 2, 3))
        before = values(scheduler)
        scheduler.intervene(metrics(level, confirmed=draw.random() < 0.7))
        for value, (low, high) in zip(values(scheduler), (bow, contrastive, dropout), strict=True):
            assert low <= value <= high
        if level:
            after = values(scheduler)
            assert after[0] >= before[0] and after[1] >= before[1] and after[2] <= before[2]


def test_a_default_beyond_its_bound_is_kept():
    scheduler = AdaptiveInterventionScheduler(4.0, 0.7, 0.05)
    for level in (1, 2, 3, 0):
        scheduler.intervene(metrics(level))
        assert values(scheduler) == [4.0, 0.7, 0.05]


def test_what_is_switched_off_stays_off():
    scheduler = AdaptiveInterventionScheduler(initial_contrastive_weight=0.0)
    for level in (1, 2, 3, 0):
        scheduler.intervene(metrics(level))
        assert scheduler.contrastive_weight == 0.0
    assert scheduler.bow_weight > 1.5, "the others moved"


def test_continues_exactly_from_saved_state(tmp_path):
    whole, first = AdaptiveInterventionScheduler(), AdaptiveInterventionScheduler()
    for level in (2, 1, 0):
        whole.intervene(metrics(level))
        first.intervene(metrics(level))
    torch.save(first.state_dict(), tmp_path / "weights.pt")
    second = AdaptiveInterventionScheduler()
    second.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    for level in (0, 2, 0, 1):
        assert whole.intervene(metrics(level)) == second.intervene(metrics(level))
    assert values(whole) == values(second)


def test_saved_weights_obey_bounds_that_changed_since():
    scheduler = AdaptiveInterventionScheduler()
    scheduler.intervene(metrics(3))
    config = CollapseConfig(max_bow_weight=2.0, min_word_dropout=0.3)
    other = AdaptiveInterventionScheduler(initial_contrastive_weight=0.0, config=config)
    other.load_state_dict(scheduler.state_dict())
    assert values(other) == [2.0, 0.0, 0.3]


def test_saved_state_does_not_follow_the_scheduler():
    scheduler = AdaptiveInterventionScheduler()
    state = scheduler.state_dict()
    scheduler.intervene(metrics(3))
    fresh = AdaptiveInterventionScheduler()
    fresh.load_state_dict(state)
    assert values(fresh) == [1.5, 0.1, 0.4]


def test_a_state_of_other_weights_is_refused():
    with pytest.raises(ValueError, match="bow_weight"):
        AdaptiveInterventionScheduler().load_state_dict({"now": {"bow_weight": 2.0}})


def test_the_descriptions_loop():
    """Collapsed posteriors from the monitor push the weight that the loop reads by name."""
    from cdpvae import CollapseMonitor

    monitor = CollapseMonitor(latent_dim=64)
    scheduler = AdaptiveInterventionScheduler(
        initial_bow_weight=1.5, initial_contrastive_weight=0.1
    )
    weights = []
    for _ in range(3):
        found = monitor.update(torch.zeros(16, 64), torch.zeros(16, 64), torch.zeros(16, 64))
        if found.is_collapsing:
            weights.append(scheduler.intervene(found)["bow_weight"])
    assert weights == [3.0, 3.0], "patience 2 lets the second and third check through"


def test_relaxation_does_not_pass_a_default_by_rounding():
    """In fp64, 0.5 + (0.1 - 0.5) is below 0.1."""
    scheduler = AdaptiveInterventionScheduler(config=CollapseConfig(relaxation_rate=1.0))
    scheduler.intervene(metrics(3))
    scheduler.intervene(metrics(0))
    assert scheduler.contrastive_weight >= 0.1
