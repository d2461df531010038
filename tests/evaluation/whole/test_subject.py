"""Groups share the encoded rows: once encoded for a seed, and the figures of each group alone."""

from __future__ import annotations

import json

import pytest

from cdpvae.evaluation.baselines import Baselines
from cdpvae.evaluation.groups.latent import measure_latent
from cdpvae.evaluation.groups.likelihood import measure_likelihood
from cdpvae.evaluation.groups.use import measure_use
from cdpvae.evaluation.whole.options import WholeOptions
from cdpvae.evaluation.whole.run import Evaluation, Subject, _measure_group
from support.opened import ROWS, given_run, random_batches

ALONE = {
    "likelihood": (measure_likelihood, {"baselines": Baselines(), "iw_rows": 5, "iw_samples": 3}),
    "use": (measure_use, {"dimension_rows": 4}),
    "latent": (measure_latent, {}),
}


def count_calls(monkeypatch, owner, name: str) -> list[int]:
    """Let a method of `owner` count its calls."""
    calls, real = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a, **k: calls.append(1) or real(*a, **k))
    return calls


def test_every_group_has_the_figures_that_it_has_alone(make_model, monkeypatch):
    model = make_model()
    opened = given_run(model, random_batches())
    seeds = [4, 5]
    alone = {
        name: [
            measure(opened, ROWS, seed=seed, progress=lambda line: None, **arguments)
            for seed in seeds
        ]
        for name, (measure, arguments) in ALONE.items()
    }
    options = WholeOptions(seed=4, seeds=2, iw_rows="5", iw_samples=3, dimension_rows=4)
    subject, result = Subject(options, opened, Baselines(), ROWS), Evaluation({})
    encoder = count_calls(monkeypatch, model, "infer")
    for name in ALONE:
        list(_measure_group(name, subject, result))
        found = result.groups[name][0].groups
        # Equal to the bit: repr of a float holds all of it.
        assert json.dumps([group.to_json() for group in found]) == json.dumps(
            [group.to_json() for group in alone[name]]
        )
    # Three batches for each of two seeds, whatever the number of groups.
    assert len(encoder) == 6


def test_the_nll_from_the_own_draw_is_computed_once(make_model, monkeypatch):
    opened = given_run(make_model(), random_batches())
    encoded = Subject(WholeOptions(), opened, Baselines(), ROWS).encoded(3, lambda line: None)
    decoder = count_calls(monkeypatch, opened.model, "decode")
    first = encoded.own_nll
    assert encoded.own_nll is first and len(decoder) == 3
    assert first.tolist() == pytest.approx(encoded.nll(encoded.z).tolist(), rel=1e-12)
