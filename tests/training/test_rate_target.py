"""Training with a rate target: the rate comes to it, and a continuation goes on bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.runs import merged, train

pytestmark = pytest.mark.launch

STEPS, STOP = 8, 5
# The bag of words makes z worth its rate; without it a small run has nothing that draws it up.
ALONE = {
    "loss": {
        "objective": "elbo",
        "free_bits": 0.0,
        "bow_weight": 30.0,
        "bow_reduction": "categorical",
        "contrastive_weight": 0.0,
    },
    "augmentation": {"augmentation_probability": 0.0},
    "collapse": {"enable_collapse_monitoring": False},
    "training": {
        "per_device_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_steps": 160,
        "eta_min": 5e-3,
        "eval_rows": 0,
    },
}


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]


def mean_rate(found: list[dict]) -> float:
    return sum(line["kl_raw"] for line in found) / len(found)


def trained(settings: dict, directory: Path, *flags: str) -> Path:
    done = train("python", 1, settings, directory, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    return directory / "run"


@pytest.fixture(scope="module")
def uncontrolled(small_settings, tmp_path_factory) -> Path:
    """The same run under annealing, without a weight on the KL."""
    settings = merged(merged(small_settings, **ALONE), loss={"beta_max": 0.0})
    return trained(settings, tmp_path_factory.mktemp("free"))


@pytest.mark.parametrize("control", ["lagrange", "pi"])
def test_the_rate_comes_to_its_target(control, uncontrolled, small_settings, tmp_path):
    target = 3.0
    loss = {"rate_target": target, "rate_control": control, "beta_max": 20.0}
    run = trained(merged(merged(small_settings, **ALONE), loss=loss), tmp_path)
    # Without a price z takes ten times as much; with the target, that, to within a quarter.
    assert mean_rate(lines(uncontrolled)[-40:]) > 5 * target
    assert mean_rate(lines(run)[-40:]) == pytest.approx(target, rel=0.25)
    # Every step's weight is written, moves, and stays in its bounds.
    betas = [line["beta"] for line in lines(run)]
    assert len(set(betas)) > 100 and 0 <= min(betas) and max(betas) <= 20


@pytest.fixture(scope="module")
def resumed(small_settings, tmp_path_factory) -> dict[str, Path]:
    """Two ranks, a target and a normalised mean: a whole run, and one stopped and continued."""
    root = tmp_path_factory.mktemp("rate")
    settings = merged(
        small_settings,
        model={
            "encoder_dropout": 0.0,
            "pooling_dropout": 0.0,
            "latent": {
                "kind": "gaussian",
                "latent_dim": 8,
                "posterior": "batch_norm",
                "committed_rate": 0.1,
            },
        },
        loss={"free_bits": 0.0, "rate_target": 3.0},
        training={"max_steps": STEPS},
    )
    runs = {
        "whole": [("--eval-steps", "4")],
        "cut": [("--eval-steps", "4", "--stop-after", str(STOP)), ("--resume", "latest")],
    }
    for number, (name, parts) in enumerate(runs.items()):
        for part, flags in enumerate(parts):
            port = 29861 + 2 * number + part
            done = train("deepspeed", 2, settings, root / name, *flags, port=port)
            assert done.returncode == 0, done.stderr[-3000:]
    return {name: root / name / "run" for name in runs}


def test_a_continuation_is_the_whole_run(resumed):
    assert lines(resumed["whole"]) == lines(resumed["cut"])
    assert len({line["beta"] for line in lines(resumed["whole"])}) == STEPS
    files = [run / f"checkpoint-{STEPS}" / "heads.safetensors" for run in resumed.values()]
    assert files[0].read_bytes() == files[1].read_bytes()
    # The running averages have moved, and were read back with the rest.
    running = load_file(files[0])["latent.normalized_mean.running_variance"]
    assert not torch.equal(running, torch.ones(8))


def test_the_controller_is_the_same_on_every_rank(resumed):
    states = [
        torch.load(run / f"checkpoint-{STEPS}" / f"rank_{rank}.pt")["shared"]["rate_control"]
        for run in resumed.values()
        for rank in (0, 1)
    ]
    assert states[0]["average"] > 0 and all(state == states[0] for state in states)


def test_without_a_target_a_checkpoint_has_no_controller(uncontrolled):
    shared = torch.load(uncontrolled / "checkpoint-160" / "rank_0.pt")["shared"]
    assert sorted(shared) == ["interventions", "loader", "loss", "monitor"]
    assert "beta" not in lines(uncontrolled)[0]


def test_runs_shorter_than_the_annealing(small_settings, tmp_path):
    """The error names the setting that there is; a model without a latent needs no cycles."""
    short = merged(small_settings, loss={"beta_cycles": 4}, training={"max_steps": 1})
    done = train("python", 1, short, tmp_path / "gaussian")
    assert done.returncode != 0
    message = done.stderr.strip().splitlines()[-1]
    assert "beta_cycles=4 in a run of 1 steps" in message and "num_cycles" not in message
    without = {**short, "model": {**short["model"], "latent": {"kind": "none"}}}
    assert len(lines(trained(without, tmp_path / "none"))) == 1
