"""The figures of `check_latents` against statistics of the same posteriors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cdpvae import LatentStatistics
from cdpvae.config import NoLatentConfig
from cdpvae.evaluation.latents import judge_latents, measure_latents


def opened(model, batch):
    """What `measure_latents` reads of an opened run."""
    return SimpleNamespace(model=model, checkpoint="runs/x", rows=lambda selection: [batch, batch])


def test_figures_are_those_of_the_posteriors(make_model, batch):
    model = make_model()
    figures = measure_latents(opened(model, batch), None)
    with torch.no_grad():
        code = model.infer(batch.instruction)
    statistics = LatentStatistics(6)
    for _ in range(2):
        statistics.update(code.mu, code.logvar)
    expected = statistics.compute()
    assert figures.rows == expected.rows == 8
    assert figures.active_units == expected.active_units
    assert torch.equal(figures.rate_per_dim, expected.kl_per_dim)
    assert torch.equal(figures.variance, expected.mu_variance)
    assert figures.information == expected.mutual_information
    assert figures.effective_rank == expected.effective_rank
    assert figures.mean_distance == expected.mean_distance


def test_only_the_first_threshold_is_judged(make_model, batch):
    verdicts = judge_latents(measure_latents(opened(make_model(), batch), None), free_bits=0.5)
    units = [verdict for verdict in verdicts if verdict.name.startswith("active units")]
    assert [verdict.low for verdict in units] == [3.0, None, None, None]
    names = [verdict.name for verdict in verdicts]
    assert names[4:7] == [
        "KL, nats per sequence",
        "KL, mean per dimension",
        "dimensions above free bits",
    ]


def test_a_model_without_a_latent_is_refused(make_model, batch):
    model = make_model(latent=NoLatentConfig())
    with pytest.raises(ValueError, match="trained without a latent"):
        measure_latents(opened(model, batch), None)
