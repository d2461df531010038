"""Golden runs: the quickstart, whole, as a user runs it.

Minutes each. What they showed last is committed as `docs/results.md`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.recorded import assert_same, recorded_lines
from support.runs import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.launch, pytest.mark.timeout(7200)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """Data, backbone and baseline, made once for all runs of this module."""
    return tmp_path_factory.mktemp("golden")


def quickstart(shared: Path, name: str, **environment: str) -> Path:
    """Run the script -> the run's directory. The launchers' own output goes to a log beside it."""
    run = shared / name
    variables = {**os.environ, "RUN": str(run), "SHARED": str(shared), **environment}
    with (shared / f"{name}.log").open("w") as log:
        done = subprocess.run(
            ["./launch/quickstart.sh"],
            cwd=REPOSITORY,
            env=variables,
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=3600,
            check=False,
        )
    assert done.returncode == 0, (shared / f"{name}.log").read_text()[-3000:]
    return run


@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_recommended_uses_z_on_held_out_combinations(shared, seed):
    """Shuffling costs 10 nats, every attribute is right 5x chance, half the units are active."""
    run = quickstart(shared, f"seed{seed}", SEED=seed)
    report = json.loads((run / "results" / "report.json").read_text())
    assert len(report) == 7, "two measures and five attributes"
    missed = {name: row for name, row in report.items() if not row["reached"]}
    assert not missed


def test_a_second_run_repeats_the_whole_loss_curve(shared):
    first = quickstart(shared, "seed0", SEED="0")
    second = quickstart(shared, "again", SEED="0")
    curves = [(run / "model" / "steps.jsonl").read_text() for run in (first, second)]
    assert len(curves[0].splitlines()) == 900
    assert curves[0] == curves[1]


@pytest.mark.parametrize("name", ["recommended", "description"])
def test_the_first_steps_are_those_of_the_first_version(shared, name):
    """60 steps of the quickstart's training, recorded with version 0.1.0."""
    config = {"CONFIG": f"cdpvae/configs/{name}.json"}
    run = quickstart(shared, "seed0" if name == "recommended" else name, SEED="0", **config)
    lines = (run / "model" / "steps.jsonl").read_text().splitlines()[:60]
    assert_same([json.loads(line) for line in lines], recorded_lines(f"quickstart_{name}.jsonl"))


def test_run_again_reuses_what_is_there(shared):
    quickstart(shared, "seed0", SEED="0")
    log = (shared / "seed0.log").read_text()
    assert "reusing" in log and "step 50/" not in log


def test_description_is_recorded_whatever_it_shows(shared):
    run = quickstart(shared, "description", CONFIG="cdpvae/configs/description.json")
    report = json.loads((run / "results" / "report.json").read_text())
    assert len(report) == 7 and all("value" in row for row in report.values())


def test_collapse_control_earns_its_place(shared, tmp_path):
    """Detected within ten checks; with interventions shuffling z costs more in the end."""
    path = REPOSITORY / "benchmarks" / "collapse_control.py"
    spec = importlib.util.spec_from_file_location("collapse_control", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    quickstart(shared, "seed0", SEED="0")
    options = module.CollapseOptions(shared=str(shared), output=str(tmp_path))
    without, with_ = module.train(options, False), module.train(options, True)
    values = module.row(options, without, with_)
    assert values["checks_until_detected"] is not None
    assert values["checks_until_detected"] <= 10
    assert values["shuffled_cost_with"] > values["shuffled_cost_without"] + 1.0
