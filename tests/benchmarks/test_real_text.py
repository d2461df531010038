"""A row of a run on real text is what its files say."""

from __future__ import annotations

import json

import pytest

from benchmarks.real_text import RealTextOptions, gain_in_last_fifth, row_of

LINE = "step {}: validation, 400 rows: nll {:.2f} nats/sequence, kl 8.00, -elbo 50.00; cost of z"


def log(curve):
    return "\n".join([*(LINE.format(*point) for point in curve), "done: 1000 steps, 0 skipped"])


def figure(name, value, error):
    return {"name": name, "value": value, "standard_error": error}


@pytest.mark.parametrize(
    ("curve", "gain"),
    [
        # From step 800 to 1,000, not from 600.
        ([(600, 50.0), (800, 45.0), (1000, 44.8)], 0.2),
        # No validation at exactly four fifths: the last one before.
        ([(300, 50.0), (700, 46.0), (1000, 45.0)], 1.0),
        ([(1000, 45.0)], None),
    ],
)
def test_the_gain_is_that_of_the_last_fifth(curve, gain):
    assert gain_in_last_fifth(log(curve)) == pytest.approx(gain)


def test_a_row_holds_settings_log_and_figures(tmp_path):
    settings = {
        "model": {"latent": {"kind": "gaussian", "latent_dim": 32}},
        "loss": {"rate_target": 8.0},
        "training": {"seed": 3, "per_device_batch_size": 64},
    }
    figures = [figure("KL", 7.9, 0.1), figure("BLEU-4, z=mu", 0.5, None)]
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    (tmp_path / "results").mkdir()
    evaluation = {"groups": {"latent": {"figures": figures}}}
    (tmp_path / "results/evaluation.json").write_text(json.dumps(evaluation))
    (tmp_path / "log").write_text(log([(800, 45.0), (1000, 44.0)]))
    options = RealTextOptions(
        corpus="c", recipe="r", run=str(tmp_path), log=str(tmp_path / "log"), seconds=9.0
    )
    row = row_of(options)
    expected = {"seed": 3, "latent_dim": 32, "rate_target": 8.0, "steps": "1000", "kl": 7.9}
    assert expected.items() <= row.items()
    assert (row["kl_se"], row["bleu4_mu"], row["gain_in_last_fifth"]) == (0.1, 0.5, 1.0)
    assert "bleu4_mu_se" not in row and "cost_shuffled" not in row
    with pytest.raises(ValueError, match="--run /nowhere"):
        row_of(RealTextOptions(corpus="c", run="/nowhere", log=str(tmp_path / "log")))
