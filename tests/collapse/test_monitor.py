"""Levels on constructed posteriors, the sliding window, patience, and exact continuation.

Legend: N rows, Z latent.
"""

import math

import pytest
import torch

from cdpvae import CollapseMonitor, Posterior
from cdpvae.collapse import CollapseMonitor as HealthMonitor
from cdpvae.collapse import Level
from cdpvae.config import CollapseConfig
from cdpvae.latents import NoLatent
from cdpvae.latents.gaussian import active_units, mutual_information

Z = 10


def posterior(rows, active, *, noise=0.05, logvar=None, seed=0):
    """`active` of Z units with codes that follow the prior, the others switched off.

    noise: variance of q in active units. logvar: of the units that are off; 0 is the prior.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    mu = torch.zeros(rows, Z)
    mu[:, :active] = math.sqrt(1 - noise) * torch.randn(rows, active, generator=generator)
    spread = torch.full((rows, Z), 0.0 if logvar is None else logvar)
    spread[:, :active] = math.log(noise)
    return mu, spread


def check_once(mu, logvar, **settings):
    config = CollapseConfig(**{"patience": 1, "window_rows": 4096, **settings})
    return CollapseMonitor(mu.shape[1], config).update(mu, logvar)


def test_a_healthy_posterior_has_no_level():
    metrics = check_once(*posterior(500, Z))
    assert (metrics["active_units"], metrics["active_unit_ratio"]) == (Z, 1.0)
    # Z/2 log(1/0.05) = 15 nats, beyond the cap.
    assert (
        metrics["mutual_information_cap"] == math.log(500)
        and 5 < metrics["mutual_information"] <= metrics["mutual_information_cap"] + 1e-12
    )
    # KL per dimension: 1/2 log(1/0.05) = 1.5, give or take the sample of mu.
    assert metrics["mean_kl"] == pytest.approx(1.5, abs=0.1)
    assert metrics.level == Level.NONE and not metrics.is_collapsing
    assert metrics.indicators == () and metrics.notes == ()


def test_one_indicator_is_mild():
    """Two active units of ten, worth 1.5 nats each; logvar -2 in the others holds the KL up
    (0.57 nats per dimension) without telling anything."""
    metrics = check_once(*posterior(500, 2, logvar=-2.0))
    assert (
        metrics["active_unit_ratio"] == 0.2
        and metrics["mutual_information"] > 1.0
        and metrics["mean_kl"] > 0.1
    )
    assert metrics.indicators == ("active units",)
    assert metrics.level == Level.MILD and metrics.is_collapsing


def test_two_indicators_are_moderate():
    metrics = check_once(*posterior(500, 2), min_kl=0.5)
    assert metrics.indicators == ("active units", "mean KL")
    assert metrics.level == Level.MODERATE


def test_three_indicators_are_still_moderate():
    # MI of two units at noise 0.4: log(1/0.4) = 0.92, between 0.5 and 1.0.
    metrics = check_once(*posterior(3000, 2, noise=0.4))
    assert 0.5 < metrics["mutual_information"] < 1.0
    assert metrics.indicators == ("active units", "mutual information", "mean KL")
    assert metrics.level == Level.MODERATE


def test_few_active_units_are_severe_whatever_the_rest():
    mu, logvar = posterior(500, 1, noise=0.001, logvar=-2.0)
    metrics = check_once(mu, logvar, severe_au_ratio=0.15)
    assert metrics["mutual_information"] > 1.0 and metrics["mean_kl"] > 0.1
    assert metrics.level == Level.SEVERE


def test_little_information_is_severe_whatever_the_rest():
    """Units vary by 0.02, enough to count as active, under a variance of 1: next to no nats."""
    mu = 0.15 * torch.randn(500, Z, generator=torch.Generator().manual_seed(5))
    metrics = check_once(mu, torch.zeros(500, Z), min_kl=0.0)
    assert metrics["active_unit_ratio"] == 1.0 and metrics["mutual_information"] < 0.5
    assert metrics.indicators == ("mutual information",)
    assert metrics.level == Level.SEVERE


def test_a_threshold_is_missed_only_strictly_below_it():
    mu, logvar = posterior(500, 3, logvar=-2.0)
    assert check_once(mu, logvar)["active_unit_ratio"] == 0.3
    assert check_once(mu, logvar).level == Level.NONE


@pytest.mark.parametrize("rows, disregarded", [(2, [1.0]), (3, []), (100, [])])
def test_an_mi_threshold_above_the_cap_is_disregarded_and_said_so(rows, disregarded):
    """log 2 = 0.69 lies between the two thresholds, log 3 = 1.10 above both."""
    mu, logvar = posterior(rows, Z, noise=1e-4)
    metrics = check_once(mu, logvar)
    assert "mutual information" not in metrics.indicators
    assert len(metrics.notes) == len(disregarded)
    for note, threshold in zip(metrics.notes, disregarded, strict=True):
        assert f"{threshold:g}" in note and f"{math.log(rows):.2f}" in note


def test_neither_mi_threshold_fires_when_both_lie_above_the_cap():
    mu, logvar = posterior(20, Z, noise=0.05)
    metrics = check_once(mu, logvar, min_mi=50.0, severe_mi=40.0)
    assert metrics.level == Level.NONE
    assert len(metrics.notes) == 2 and "50" in metrics.notes[0] and "40" in metrics.notes[1]


@pytest.mark.parametrize("rows", [0, 1])
def test_a_window_without_two_rows_decides_nothing(rows):
    metrics = check_once(torch.zeros(rows, Z), torch.zeros(rows, Z))
    assert metrics.level == Level.NONE and not metrics.is_collapsing
    assert f"{rows} rows" in metrics.notes[0]


def test_window_slides_over_the_latest_rows():
    monitor = CollapseMonitor(Z, CollapseConfig(window_rows=100))
    mu, logvar = posterior(260, 6)
    for start in range(0, 260, 65):
        monitor.add(Posterior(mu[start : start + 65], logvar[start : start + 65]))
    metrics = monitor.check()
    assert metrics["mutual_information_cap"] == math.log(100)
    assert (
        metrics["mutual_information"] == mutual_information(mu[-100:], logvar[-100:], seed=0).lower
    )
    assert metrics["active_units"] == active_units(mu[-100:])


def test_a_batch_larger_than_the_window_leaves_its_last_rows():
    monitor = CollapseMonitor(Z, CollapseConfig(window_rows=50))
    mu, logvar = posterior(120, Z)
    monitor.add(Posterior(mu, logvar))
    assert torch.equal(monitor.state_dict()["mu"], mu[-50:])


def test_patience_counts_checks_in_a_row():
    """Bad, bad, good, bad, bad, bad, with patience 2 and a window of one batch."""
    monitor = CollapseMonitor(Z, CollapseConfig(patience=2, window_rows=64))
    bad, good = posterior(64, 0), posterior(64, Z)
    history = [monitor.update(*batch) for batch in (bad, bad, good, bad, bad, bad)]
    assert [m.level > 0 for m in history] == [True, True, False, True, True, True]
    assert [m.is_collapsing for m in history] == [False, True, False, False, True, True]


def test_the_window_does_not_follow_later_changes_of_its_input():
    monitor = CollapseMonitor(Z)
    mu, logvar = posterior(64, Z)
    monitor.add(Posterior(mu, logvar))
    mu.zero_()
    assert monitor.check()["active_units"] == Z


def test_infonce_bound_is_shown_for_two_views():
    """Equal views of orthogonal rows: loss log(1 + (K - 1) e^(-1/0.07)), next to nothing."""
    mu = torch.eye(Z)
    metrics = CollapseMonitor(Z).update(mu, torch.zeros(Z, Z), mu)
    loss = math.log1p((Z - 1) * math.exp(-1 / 0.07))
    assert metrics.infonce_bound == pytest.approx(math.log(Z) - loss, abs=1e-5)
    # Views that tell rows apart not at all: 0.
    same = torch.ones(Z, Z)
    metrics = CollapseMonitor(Z).update(mu, torch.zeros(Z, Z), same)
    assert metrics.infonce_bound == pytest.approx(0.0, abs=1e-5)
    assert CollapseMonitor(Z).update(mu, torch.zeros(Z, Z)).infonce_bound is None


def test_continues_exactly_from_saved_state(tmp_path):
    """Through a file read with weights_only, in mid-window and with patience half used."""
    config = CollapseConfig(window_rows=80, patience=3)
    batches = [posterior(48, active, seed=i) for i, active in enumerate((1, 1, 1, 1, Z))]
    whole = CollapseMonitor(Z, config)
    expected = [whole.update(*batch) for batch in batches]
    first = CollapseMonitor(Z, config)
    for batch in batches[:2]:
        first.update(*batch)
    torch.save(first.state_dict(), tmp_path / "monitor.pt")
    second = CollapseMonitor(Z, config)
    second.load_state_dict(torch.load(tmp_path / "monitor.pt", weights_only=True))
    assert [second.update(*batch) for batch in batches[2:]] == expected[2:]
    assert expected[2].is_collapsing, "the saved run of checks did not count"
    for name, value in whole.state_dict().items():
        other = second.state_dict()[name]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


def test_saved_state_does_not_follow_the_monitor():
    monitor = CollapseMonitor(Z)
    monitor.add(Posterior(*posterior(8, Z)))
    state = monitor.state_dict()
    saved = state["mu"].clone()
    monitor.update(*posterior(8, Z, seed=1))
    assert torch.equal(state["mu"], saved) and state["checks"] == 0


def test_checks_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    monitor = CollapseMonitor(Z)
    first = monitor.update(*posterior(64, Z, noise=0.9))
    assert torch.equal(torch.get_rng_state(), state)
    # Every check must draw anew.
    assert monitor.check()["mutual_information"] != first["mutual_information"], (
        "every check must draw anew"
    )


def test_wrong_shapes_are_refused():
    monitor = CollapseMonitor(Z)
    with pytest.raises(ValueError, match=r"\(4, 3\).*\(rows, 10\)"):
        monitor.update(torch.zeros(4, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"\(4, 10\) and logvar \(3, 10\)"):
        monitor.update(torch.zeros(4, Z), torch.zeros(3, Z))
    with pytest.raises(ValueError, match="3 dimensions"):
        monitor.load_state_dict(CollapseMonitor(3).state_dict())


def test_an_empty_window_of_another_family_is_none():
    """Version 0.1.0 kept an empty window of mu and logvar for a model without a latent, too."""
    monitor = HealthMonitor(NoLatent(), CollapseConfig())
    empty = {"mu": torch.zeros(0, 64), "logvar": torch.zeros(0, 64)}
    monitor.load_state_dict({**empty, "checks": 3, "in_a_row": 1})
    assert monitor.window is None and (monitor.checks, monitor.in_a_row) == (3, 1)
    full = {name: torch.zeros(2, 64) for name in empty}
    with pytest.raises(ValueError, match="no EmptyCode of this latent family"):
        monitor.load_state_dict({**full, "checks": 3, "in_a_row": 1})
