"""The use of z measured in training: its figures, that training does not notice, what fires."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from cdpvae.batch import VAEBatch
from cdpvae.config import Settings, parse_settings
from cdpvae.data import VAECollator
from cdpvae.data.dataset import TokenColumn, TokenDataset
from cdpvae.evaluation.likelihood import evaluate_likelihood
from cdpvae.tasks.text_vae.use_probe import PassTimes, UseProbe, watched_use
from cdpvae.training.distributed import World
from support.runs import REPOSITORY, merged, run_command, train

WORKER = REPOSITORY / "tests" / "tasks" / "text_vae" / "ignored_z_worker.py"
ALONE = World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
WATCH = {"watch_use": True, "check_every": 2, "use_rows": 8, "use_window_rows": 24, "patience": 1}


@pytest.fixture
def split() -> TokenDataset:
    """Eleven rows of unequal length."""
    generator = torch.Generator().manual_seed(4)

    def column(low: int) -> TokenColumn:
        lengths = [low + n % 5 for n in range(11)]
        return TokenColumn.from_lists(
            [[1, *torch.randint(4, 64, (n,), generator=generator).tolist(), 2] for n in lengths]
        )

    return TokenDataset(column(3), column(2), "none", "none")


def settings_of(**collapse) -> Settings:
    return parse_settings({"collapse": {"watch_use": True, **collapse}})


def expected(model, split, indices) -> tuple[float, float]:
    """Mean cost of another row's z, and mean KL, by the evaluation's own code."""
    batch: VAEBatch = VAECollator()(split.rows(indices), indices)
    found = evaluate_likelihood(model, [batch], seed=0)
    return found.costs["shuffled"], found.kl


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """No process group: a gather returns the rows of this rank."""
    monkeypatch.setattr("cdpvae.tasks.text_vae.use_probe.all_gather_rows", lambda rows: rows)


def test_it_measures_the_cost_of_shuffled_z_row_by_row(make_model, split):
    model = make_model()
    probe = UseProbe(settings_of(use_rows=4), ALONE, model, split)
    # The second window passes the end and goes on with the first rows.
    for start, indices in ((0, [0, 1, 2, 3]), (9, [9, 10, 0, 1])):
        differences, kl = probe.measure(start)
        cost, rate = expected(model, split, indices)
        assert float(differences.mean()) == pytest.approx(cost, abs=1e-5)
        assert float(kl.mean()) == pytest.approx(rate, rel=1e-5)
        assert len(differences) == 4 and float(differences.std()) > 0


def test_ranks_take_turns_over_the_rows(make_model, split):
    model = make_model()
    ranks = [World(rank, 3, 0, torch.device("cpu")) for rank in range(3)]
    probes = [UseProbe(settings_of(use_rows=7), rank, model, split) for rank in ranks]
    assert [probe.rows_per_check for probe in probes] == [9, 9, 9]
    for probe, indices in zip(probes, ([5, 6, 7], [8, 9, 10], [0, 1, 2]), strict=True):
        cost, _ = expected(model, split, indices)
        assert float(probe.measure(5)[0].mean()) == pytest.approx(cost, abs=1e-5)


def test_a_check_never_holds_a_row_twice(make_model, split):
    probe = UseProbe(settings_of(use_rows=64), ALONE, make_model(), split)
    assert probe.rows_per_check == 11


def test_training_does_not_notice(make_model, split):
    """Dropout is on before and after, no generator moves, and no dropout is in the figure."""
    model = make_model(dropout=0.5).train()
    probe = UseProbe(settings_of(use_rows=4), ALONE, model, split)
    before = torch.get_rng_state()
    first, second = probe.measure(0)[0], probe.measure(0)[0]
    assert torch.equal(before, torch.get_rng_state())
    assert model.training and model.projector.training
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("training", "has_split", "words"),
    [
        ({"eval_rows": 0}, True, "eval_rows is 0"),
        ({}, False, "fewer than two validation rows"),
    ],
)
def test_without_rows_it_says_so(make_model, split, training, has_split, words):
    settings = parse_settings({"collapse": {"watch_use": True}, "training": training})
    window, probe, line = watched_use(
        settings, ALONE, make_model(), split if has_split else None, 100
    )
    assert window is None and probe is None and words in line and "\n" not in line


def test_the_line_says_when_judgement_begins(make_model, split):
    def line(steps: int) -> str:
        return watched_use(settings_of(use_rows=8), ALONE, make_model(), split, steps)[2]

    # 256 rows of 8 take 32 checks.
    assert "judged from step 640" in line(900)
    assert "judged from step 1020" in line(3000)
    assert "never judged" in line(600)
    assert watched_use(Settings(), ALONE, make_model(), split, 600) == (None, None, "")


def test_the_share_of_the_step_time():
    times = PassTimes()
    times.passes, times.steps = [0.3, 9.0, 0.3], times.steps.__class__([1.0, 1.0, 50.0])
    # 0.3 s once in 20 steps of a second; a first pass and a saved step do not count.
    assert "took 1.5% of the step time" in times.describe(20)


def lines(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def test_curves_are_equal_with_and_without(small_settings, tmp_path):
    """Dropout, augmented views and an evaluation in the middle; interventions off."""
    runs = {}
    for name, watch in (("with", WATCH), ("without", {"check_every": 2})):
        settings = merged(
            small_settings,
            collapse={**watch, "collapse_interventions": False},
            training={"eval_steps": 4},
        )
        done = train("python", 1, settings, tmp_path / name)
        assert done.returncode == 0, done.stderr[-3000:]
        runs[name] = tmp_path / name / "run"
        assert ("of the step time" in done.stdout) is (name == "with")
    curves = [(run / "steps.jsonl").read_text() for run in runs.values()]
    assert curves[0] == curves[1] and len(curves[0].splitlines()) == 8
    checks = {name: lines(run, "checks.jsonl") for name, run in runs.items()}
    assert [check["use_rows"] for check in checks["with"]] == [8, 16, 24, 24]
    assert all("use" not in check for check in checks["without"])


def test_a_resumed_run_measures_as_the_whole_one(small_settings, tmp_path):
    settings = merged(small_settings, collapse=WATCH)
    for name, calls in (("whole", [[]]), ("cut", [["--stop-after", "5"], ["--resume", "latest"]])):
        for flags in calls:
            done = train("python", 1, settings, tmp_path / name, *flags)
            assert done.returncode == 0, done.stderr[-3000:]
    for file in ("steps.jsonl", "checks.jsonl"):
        whole, cut = (tmp_path / name / "run" / file for name in ("whole", "cut"))
        assert whole.read_text() == cut.read_text()


def test_a_decoder_that_ignores_z_is_caught_after_the_grace_period(small_settings, tmp_path):
    """Its posterior is made to look healthy: thresholds of 0 that nothing misses."""
    blind = {"min_au_ratio": 0.0, "severe_au_ratio": 0.0, "min_mi": 0.0, "severe_mi": 0.0}
    settings = merged(
        small_settings,
        collapse={**WATCH, **blind, "min_kl": 0.0},
        training={"max_steps": 12, "output_dir": str(tmp_path / "run"), "logging_steps": 100},
    )
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    done = run_command([sys.executable, str(WORKER), str(tmp_path / "settings.json")])
    assert done.returncode == 0, done.stderr[-3000:]
    checks = lines(tmp_path / "run", "checks.jsonl")
    assert all(check["use"] == 0.0 for check in checks)
    # A third of 12 steps is grace, and 24 rows are there after the third check.
    young, old = checks[:2], checks[2:]
    # The estimated mutual information of a few codes may lie below 0, which is mild.
    assert [(check["level"] < 2, check["is_collapsing"]) for check in young] == [(True, False)] * 2
    assert [(check["level"], check["is_collapsing"]) for check in old] == [(2.0, True)] * 4
    assert checks[-1]["bow_weight"] > checks[0]["bow_weight"] == 1.5
    assert checks[-1]["word_dropout"] < 0.4
