"""What a sweep measures of a run: the estimators of `cdpvae.evaluate`, as columns of the table."""

from __future__ import annotations

import pytest

from cdpvae.config import NoLatentConfig
from cdpvae.evaluation.groups.use import measure_use
from cdpvae.evaluation.likelihood import evaluate_likelihood
from cdpvae.experiments.measure import Evaluation
from cdpvae.experiments.table import FIGURES
from support.opened import ROWS, given_run, random_batches

EVALUATION = Evaluation(num_rows=12, rows_per_batch=4, seed=5)


def test_costs_and_errors_are_those_of_the_group_use(make_model):
    opened = given_run(make_model(), random_batches())
    figures = EVALUATION.figures(opened)
    group = measure_use(opened, ROWS, seed=5, dimension_rows=1, progress=lambda line: None)
    for name, column in (
        ("NLL from z ~ q", "nll_q"),
        ("cost of z shuffled", "cost_shuffled"),
        ("cost of z from the prior", "cost_prior"),
        ("cost of z zero", "cost_zero"),
    ):
        assert figures[column] == group[name].value
        assert figures[f"{column}_se"] == group[name].standard_error


def test_means_and_health_are_those_of_the_likelihood(make_model):
    model, batches = make_model(), random_batches()
    figures = EVALUATION.figures(given_run(model, batches))
    known = evaluate_likelihood(model, batches, seed=5)
    for name in ("rows", "tokens", "nll_q", "nll_mu", "kl", "neg_elbo"):
        assert figures[name] == pytest.approx(getattr(known, name), rel=1e-6)
    for name, value in known.health.items():
        assert figures[name] == value
    own = {name for name in FIGURES if not name.startswith("baseline")}
    assert own <= figures.keys()


def test_batches_of_one_row_have_a_cost_and_errors(make_model):
    """Within a batch there was nothing to shuffle, and a single batch had no error."""
    model = make_model()
    alone = EVALUATION.figures(given_run(model, random_batches(count=6, rows=1)))
    assert alone["cost_shuffled"] != 0 and alone["cost_shuffled_se"] > 0
    together = EVALUATION.figures(given_run(model, random_batches(count=1)))
    assert together["nll_q_se"] > 0
    single = EVALUATION.figures(given_run(model, random_batches(count=1, rows=1)))
    assert "cost_shuffled" not in single and "nll_q_se" not in single


def test_a_decoder_without_z_has_one_likelihood(make_model):
    figures = EVALUATION.figures(given_run(make_model(latent=NoLatentConfig()), random_batches()))
    assert figures["nll_q"] == figures["nll_mu"] == figures["neg_elbo"] and figures["kl"] == 0
    assert not any(name.startswith("cost") for name in figures)
