"""The group `latent` of posteriors that are known."""

from __future__ import annotations

import math

import pytest

from cdpvae.config import NoLatentConfig
from cdpvae.evaluation.groups.latent import measure_latent
from cdpvae.evaluation.latents import measure_latents
from cdpvae.latents import Posterior
from support.opened import ROWS, given_run, random_batches
from support.posteriors import gaussian_case


def silent(line: str) -> None:
    pass


def measure(opened):
    return measure_latent(opened, ROWS, seed=3, progress=silent)


def known(make_model, monkeypatch, mu, logvar):
    """A run whose encoder gives these posteriors, whatever the text."""
    model = make_model()
    monkeypatch.setattr(model, "infer", lambda text: Posterior(mu, logvar))
    return given_run(model, random_batches(1, len(mu)))


def test_an_aggregate_that_is_the_prior(make_model, monkeypatch):
    """Means and noise of variance 1/2 each: KL = 6 * ln 2 / 2 = 2.08 nats, all of it MI."""
    group = measure(known(make_model, monkeypatch, *gaussian_case(1500, 6, 0.5)))
    assert group["KL"].value == pytest.approx(3 * math.log(2), rel=1e-6)
    for name in ("MI, lower", "MI, upper"):
        assert group[name].value == pytest.approx(3 * math.log(2), rel=0.15)
    assert group["MI, lower"].value <= group["MI, lower"].cap == pytest.approx(math.log(1500))
    # Spread over rows: of the KL it is that of |mu|^2 / 2, a chi-squared of 6 degrees times 1/4.
    assert group["KL"].standard_error == pytest.approx(12**0.5 / 4 / 1500**0.5, rel=0.1)
    assert 0 < group["MI, lower"].standard_error < 0.1
    gap = group["KL"].value - group["MI, lower"].value
    assert group["marginal KL"].value == pytest.approx(gap)
    assert group["covered units (CU)"].value == 6 == group["covered units (CU)"].cap
    assert group["share of the prior in holes"].value < 0.03
    assert group["effective rank"].value == pytest.approx(6, rel=0.02)
    assert group["active units at 0.2"].value == 6
    assert len(group.series["KL per dimension"]) == 6


def test_a_shrunken_aggregate_is_not_covered_and_full_of_holes(make_model, monkeypatch):
    mu, logvar = gaussian_case(400, 6, 0.5)
    group = measure(known(make_model, monkeypatch, 0.3 * mu, logvar - 3.0))
    assert group["covered units (CU)"].value == 0
    assert min(group.series["KL of the prior to the aggregate per dimension"]) > 0.5
    assert group["KL of the prior to the aggregate"].value > 6
    assert group["share of the prior in holes"].value > 0.8


def test_mutual_information_stays_below_its_cap(make_model, monkeypatch):
    """Posteriors that never overlap tell all rows apart: the lower estimate is log N itself."""
    mu, logvar = gaussian_case(40, 6, 0.5)
    group = measure(known(make_model, monkeypatch, 10 * mu, logvar - 12.0))
    assert group["MI, lower"].value == pytest.approx(math.log(40), abs=1e-6)
    assert group["MI, lower"].value <= group["MI, lower"].cap + 1e-12


def test_figures_are_those_of_the_narrow_command(make_model):
    opened = given_run(make_model(), random_batches())
    group, narrow = measure(opened), measure_latents(opened, ROWS)
    assert group["KL"].value == narrow.rate and group["KL"].rows == 12
    assert group["effective rank"].value == narrow.effective_rank
    assert group.series["variance of mu per dimension"] == narrow.variance.tolist()


def test_a_family_without_densities_says_what_is_left_out(make_model, monkeypatch):
    model = make_model()
    for name in ("log_q", "log_q_of_dim", "information"):
        monkeypatch.setattr(model.latent, name, lambda *args, **more: None)
    group = measure(given_run(model, random_batches()))
    names = {figure.name for figure in group.figures}
    assert "KL" in names and not names & {"MI, lower", "marginal KL", "covered units (CU)"}
    assert len(group.notes) == 2


def test_a_model_without_a_latent_is_refused(make_model):
    with pytest.raises(ValueError, match="trained without a latent"):
        measure(given_run(make_model(latent=NoLatentConfig()), random_batches()))
