"""The command itself, on small runs: two settings trained, measured, tabled, drawn."""

from __future__ import annotations

import csv
import json
import shutil

import pytest

from cdpvae import sweep
from cdpvae.evaluation.checkpoint import RowSelection, open_run
from cdpvae.evaluation.likelihood import evaluate_likelihood
from cdpvae.experiments.measure import Evaluation
from support.runs import merged, train


@pytest.mark.slow
@pytest.mark.launch
def test_a_sweep_of_two_settings(small_settings, tmp_path, capsys):
    config = tmp_path / "base.json"
    steps = {"max_steps": 3, "eval_rows": 0, "sample_rows": 0}
    config.write_text(json.dumps(merged(small_settings, training=steps)))
    output = tmp_path / "out"
    arguments = ["--config", str(config), "--vary", "loss.beta_max=0.1,4", "--output", str(output)]
    # A training flag reaches every run.
    arguments += ["--learning-rate", "0.02", "--rows-per-batch", "6"]
    assert sweep.main(arguments) == 0, capsys.readouterr()
    with (output / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["status"], row["steps"]) for row in rows] == [("finished", "3")] * 2
    assert (output / "sweep.png").exists()
    given = json.loads((output / "settings" / f"{rows[0]['run']}.json").read_text())
    assert given["training"]["learning_rate"] == 0.02

    # The figures are those of the evaluation of the run's checkpoint.
    opened = open_run(str(output / "runs" / rows[0]["run"] / "checkpoint-3"))
    batches = opened.rows(RowSelection("validation", None, 1000, 6))
    known = evaluate_likelihood(opened.model, batches, seed=0)
    assert len(batches) > 1
    for name in ("nll_q", "nll_mu", "kl", "neg_elbo", "tokens"):
        assert float(rows[0][name]) == pytest.approx(getattr(known, name), rel=1e-6)
    for name in ("nll_q", "kl", "neg_elbo", "cost_shuffled"):
        assert float(rows[0][f"{name}_se"]) > 0
    for name in ("prior", "zero"):
        assert float(rows[0][f"cost_{name}"]) == pytest.approx(known.costs[name], rel=1e-9)
    assert float(rows[0]["mutual_information"]) == known.health["mutual_information"]
    assert {row["nll_q"] for row in rows} != {rows[0]["nll_q"]}, "two settings, two results"
    # The decoder without z is measured on the same rows, once for all runs.
    lone = merged(small_settings, training=steps, model={"latent": {"kind": "none"}})
    assert train("python", 1, lone, tmp_path / "none").returncode == 0
    baseline = tmp_path / "none" / "run" / "checkpoint-3"
    beside = Evaluation(8, 4, str(baseline))
    figures = beside(opened.checkpoint, None)
    without = open_run(str(baseline))
    rows_8 = without.rows(RowSelection("validation", None, 8, 4))
    nll = evaluate_likelihood(without.model, rows_8, seed=0).nll_q
    assert figures["baseline_nll"] == pytest.approx(nll, rel=1e-9) and figures["rows"] == 8
    assert figures["baseline_nll"] != figures["nll_q"] and figures["baseline_nll_se"] > 0
    # A model with a latent is no baseline.
    wrong = Evaluation(8, 4, str(opened.checkpoint))
    with pytest.raises(ValueError, match="latent none"):
        wrong(opened.checkpoint, None)

    # A clean checkout has the table alone; nothing is trained again.
    for name in ("runs", "settings", "logs"):
        shutil.rmtree(output / name)
    capsys.readouterr()
    assert sweep.main(arguments) == 0
    assert "2 runs, 2 of them finished before" in capsys.readouterr().out
    assert not (output / "runs").exists()
    # Other settings than those of its rows are refused.
    assert sweep.main([*arguments, "--free-bits", "0.3"]) == 2
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--vary is needed"),
        (["--vary", "loss.beta_max=1", "--num-rows", "0"], "--num-rows 0"),
        (["--vary", "loss.beta_max=1", "--devices", "0,0"], "--devices 0,0"),
        (["--vary", "loss.beta_max=1", "--devices", "0", "--launch", "x"], "--launch"),
        (["--vary", "loss.beta_max=1", "--baseline", "nowhere"], "--baseline nowhere"),
        (["--vary", "loss.beta_max=1", "--published", "nowhere"], "--published nowhere"),
        (["--vary", "loss.beta_max=1", "--seeds", "x"], "--seeds x"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, flags, words):
    assert sweep.main(["--output", str(tmp_path / "out"), *flags]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert words in line
    assert not (tmp_path / "out").exists()


def test_the_output_has_no_default(capsys):
    assert sweep.main(["--vary", "loss.beta_max=1"]) == 2
    assert "--output is needed" in capsys.readouterr().err
