"""A sweep goes on from its table: with trainings and evaluations that are stand-ins."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cdpvae.config import Settings, parse_settings
from cdpvae.experiments.chart import Published, curve_points, draw_curve, read_published
from cdpvae.experiments.plan import make_plan, parse_varied
from cdpvae.experiments.runs import ChildTrainer, RunFailed, Trained
from cdpvae.experiments.sweep import Sweep
from cdpvae.experiments.table import SweepTable
from support.runs import REPOSITORY

KEYS = ["loss.beta_max"]


class FakeTrainer:
    """Remembers what it was asked to train; fails for the names it is given."""

    def __init__(self, failing=(), interrupt_at=None):
        self.trained, self.failing, self.interrupt_at = [], failing, interrupt_at
        self.stopped = False

    def __call__(self, run, device):
        self.trained.append(run.name)
        if run.name in self.failing:
            raise RunFailed("error: out of memory")
        return Trained(Path(run.name), 5, 1.5)

    def stop(self):
        self.stopped = True


def fake_figures(checkpoint, device):
    beta = float(checkpoint.name.split("_seed")[0].removeprefix("beta_max-"))
    seed = float(checkpoint.name.rpartition("-")[2])
    rate = 12 - beta + seed
    return {"kl": rate, "nll_q": 30 - 2 * rate, "neg_elbo": 30 - rate, "cost_shuffled": rate / 2}


def plan_of(output: Path, base: Settings | None = None, betas="1,4", seeds=(0, 1)):
    varied = [parse_varied(f"loss.beta_max={betas}")]
    return make_plan(base or Settings(), varied, seeds, output, "rows 8")


def sweep(output: Path, train: FakeTrainer, plan=None, said=None) -> bool:
    say = (said if said is not None else []).append
    return Sweep(output, train, fake_figures, say=say).run(plan or plan_of(output))


def rows_of(output: Path) -> list[dict[str, str]]:
    with (output / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def test_every_run_has_a_row_with_its_figures(tmp_path):
    train = FakeTrainer()
    assert sweep(tmp_path, train)
    rows = rows_of(tmp_path)
    assert [(r["loss.beta_max"], r["seed"]) for r in rows] == [
        ("1.0", "0"),
        ("1.0", "1"),
        ("4.0", "0"),
        ("4.0", "1"),
    ]
    assert {r["status"] for r in rows} == {"finished"}
    assert [float(r["kl"]) for r in rows] == [11, 12, 8, 9]
    assert rows[0]["steps"] == "5" and rows[0]["seconds"] == "1.5"
    assert rows[0]["settings_hash"] == plan_of(tmp_path)[0].settings_hash
    assert "torch " in rows[0]["versions"]


def test_a_finished_row_is_never_repeated_and_new_values_are_added(tmp_path):
    assert sweep(tmp_path, FakeTrainer(), plan_of(tmp_path, betas="1"))
    again, more = FakeTrainer(), FakeTrainer()
    # The table alone decides: no run directory was ever made.
    assert sweep(tmp_path, again, plan_of(tmp_path, betas="1")) and again.trained == []
    assert sweep(tmp_path, more, plan_of(tmp_path, betas="1,2"))
    assert more.trained == ["beta_max-2.0_seed-0", "beta_max-2.0_seed-1"]
    assert len(rows_of(tmp_path)) == 4


def test_other_settings_than_those_of_the_table_are_refused(tmp_path):
    assert sweep(tmp_path, FakeTrainer())
    before = (tmp_path / "sweep.csv").read_bytes()
    train = FakeTrainer()
    other = plan_of(tmp_path, parse_settings({"loss": {"free_bits": 0.1}}), betas="1,9")
    with pytest.raises(ValueError, match=r"other settings.*--output"):
        sweep(tmp_path, train, other)
    assert train.trained == [] and (tmp_path / "sweep.csv").read_bytes() == before


def test_a_table_that_varies_other_settings_is_refused(tmp_path):
    assert sweep(tmp_path, FakeTrainer())
    varied = [parse_varied("loss.free_bits=0.1")]
    with pytest.raises(ValueError, match=r"loss\.beta_max.*loss\.free_bits.*--output"):
        sweep(tmp_path, FakeTrainer(), make_plan(Settings(), varied, [0], tmp_path, "rows 8"))


def test_a_last_line_that_was_cut_short_is_measured_again(tmp_path):
    assert sweep(tmp_path, FakeTrainer())
    path = tmp_path / "sweep.csv"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    # Within the first field, in the middle, and with the line's end alone missing.
    for cut in (len(whole) - len(lines[-1]) + 3, len(whole) - len(lines[-1]) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        train, said = FakeTrainer(), []
        assert sweep(tmp_path, train, said=said)
        assert train.trained == ["beta_max-4.0_seed-1"]
        assert any("cut short" in line for line in said)
        assert path.read_bytes() == whole


def test_a_failed_run_has_its_row_and_the_sweep_goes_on(tmp_path):
    bad = "beta_max-1.0_seed-1"
    train, said = FakeTrainer(failing={bad}), []
    assert not sweep(tmp_path, train, said=said)
    assert len(train.trained) == 4
    row = next(r for r in rows_of(tmp_path) if r["run"] == bad)
    assert (row["status"], row["last_line"], row["kl"]) == ("failed", "error: out of memory", "")
    assert any("out of memory" in line for line in said)
    # At the next start it is the only one that is tried, and its row is replaced.
    again = FakeTrainer()
    assert sweep(tmp_path, again) and again.trained == [bad]
    assert [r["status"] for r in rows_of(tmp_path)] == ["finished"] * 4


def test_two_devices_share_the_runs(tmp_path):
    seen = []

    class Slow(FakeTrainer):
        def __call__(self, run, device):
            seen.append(device)
            time.sleep(0.2)
            return super().__call__(run, device)

    train = Slow()
    work = Sweep(tmp_path, train, fake_figures, say=lambda line: None)
    assert work.run(plan_of(tmp_path), ["0", "1"])
    assert sorted(train.trained) == sorted(run.name for run in plan_of(tmp_path))
    assert set(seen) == {"0", "1"} and len(rows_of(tmp_path)) == 4


# The picture


def test_points_are_means_over_seeds_of_finished_rows(tmp_path):
    sweep(tmp_path, FakeTrainer(failing={"beta_max-4.0_seed-1"}))
    points = curve_points(rows_of(tmp_path), KEYS)
    assert [(p.label, p.seeds) for p in points] == [("beta_max=4.0", 1), ("beta_max=1.0", 2)]
    assert (points[1].rate.mean, points[1].rate.least, points[1].rate.most) == (11.5, 11, 12)
    assert points[1].distortion.mean == 7


def test_the_picture_shows_rows_and_published_ones(tmp_path):
    from matplotlib import image

    assert sweep(tmp_path, FakeTrainer())
    ours = image.imread(tmp_path / "sweep.png")
    assert ours.shape[0] > 300 and ours.std() > 0.05
    file = tmp_path / "published.json"
    file.write_text(json.dumps([{"name": "somebody 2019", "kl": 10.0, "nll": 9.0}]))
    draw_curve(tmp_path / "with.png", rows_of(tmp_path), KEYS, read_published(str(file)))
    theirs = image.imread(tmp_path / "with.png")
    # The published square is red; nothing of ours is.
    red = (theirs[..., 0] > 0.6) & (theirs[..., 1] < 0.3) & (theirs[..., 2] < 0.3)
    assert red.sum() > 10
    assert not ((ours[..., 0] > 0.6) & (ours[..., 1] < 0.3) & (ours[..., 2] < 0.3)).any()
    assert read_published(str(file)) == [Published("somebody 2019", 10.0, 9.0)]


@pytest.mark.parametrize("content", ["{", "{}}", '[{"name": "x"}]', "[1]"])
def test_a_published_file_that_is_no_list_of_rows(tmp_path, content):
    file = tmp_path / "published.json"
    file.write_text(content)
    with pytest.raises(ValueError, match="--published"):
        read_published(str(file))


def test_no_finished_row_no_picture(tmp_path):
    names = {run.name for run in plan_of(tmp_path)}
    assert not sweep(tmp_path, FakeTrainer(failing=names))
    assert not (tmp_path / "sweep.png").exists()


def test_the_table_in_the_terminal_is_in_numeric_order(tmp_path):
    sweep(tmp_path, FakeTrainer(), plan_of(tmp_path, betas="10,2"))
    lines = SweepTable(tmp_path / "sweep.csv", KEYS).lines()
    assert [line.split()[0] for line in lines] == ["loss.beta_max", *["2.0"] * 2, *["10.0"] * 2]


# Child processes, with a stand-in for the training

STAND_IN = """
import json, pathlib, sys, time
arguments = sys.argv[1:]
assert arguments[0] == "cdpvae.train", arguments
settings = json.loads(pathlib.Path(arguments[arguments.index("--config") + 1]).read_text())
directory = pathlib.Path(settings["training"]["output_dir"])
print("arguments", arguments[3:])
beta = settings["loss"]["beta_max"]
if beta == 66:
    print("error: no room\\nTraceback says more")
    sys.exit(2)
checkpoint = directory / "checkpoint-3"
checkpoint.mkdir(parents=True, exist_ok=True)
(checkpoint / "state.json").write_text('{"step": 3}')
(checkpoint / "manifest.json").write_text("{}")
(directory / "latest").write_text("checkpoint-3\\n")
print("saved", flush=True)
if beta == 99 and "--resume" not in arguments:
    time.sleep(300)
"""


@pytest.fixture
def stand_in(tmp_path) -> str:
    script = tmp_path / "train.py"
    script.write_text(STAND_IN)
    return f"{sys.executable} {script}"


def test_a_child_trains_and_says_why_it_failed(tmp_path, stand_in):
    good, bad = plan_of(tmp_path, betas="1,66", seeds=[0])
    trainer = ChildTrainer(tmp_path, stand_in)
    trained = trainer(good, None)
    assert trained.steps == 3 and trained.checkpoint.name == "checkpoint-3"
    # A second attempt continues, and its time is added.
    second = trainer(good, None)
    log = (tmp_path / "logs" / f"{good.name}.log").read_text()
    assert "['--resume', 'latest']" in log and log.count("sweep: ended after") == 2
    assert second.seconds >= trained.seconds
    with pytest.raises(RunFailed, match="^error: no room$"):
        trainer(bad, None)


def test_a_directory_without_a_checkpoint_starts_anew(tmp_path, stand_in):
    (run,) = plan_of(tmp_path, betas="1", seeds=[0])
    left = Path(run.settings.training.output_dir) / "steps.jsonl"
    left.parent.mkdir(parents=True)
    left.write_text("{}\n")
    ChildTrainer(tmp_path, stand_in)(run, None)
    assert not left.exists()
    assert "--resume" not in (tmp_path / "logs" / f"{run.name}.log").read_text()


@pytest.mark.launch
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_sweep_ends_its_training_and_keeps_its_rows(tmp_path, stand_in, number):
    """The measured figures are stand-ins too; everything else is the command's own way."""
    output = tmp_path / "out"
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "from cdpvae import sweep\n"
        "from cdpvae.experiments import measure\n"
        "measure.Evaluation.__call__ = lambda self, checkpoint, device: "
        "{'kl': 1.0, 'nll_q': 2.0, 'neg_elbo': 3.0, 'cost_shuffled': 0.5}\n"
        "sys.exit(sweep.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, str(program), "--vary", "loss.beta_max=1,99"]
    command += ["--output", str(output), "--launch", stand_in]
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'kernels'}"}
    started = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        log = output / "logs" / "beta_max-99.0_seed-0.log"
        deadline = time.monotonic() + 120
        while not (log.exists() and "saved" in log.read_text()):
            assert time.monotonic() < deadline and started.poll() is None
            time.sleep(0.1)
        started.send_signal(number)
        assert started.wait(timeout=60) == 130
        assert "interrupted" in started.stderr.read()
    finally:
        started.kill()
        started.stderr.close()
    assert "status -15" in log.read_text(), "the training was ended, and not left behind"
    assert [row["loss.beta_max"] for row in rows_of(output)] == ["1.0"]
    # The same command goes on with the interrupted run, from its checkpoint.
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "1 of them finished before" in again.stdout
    assert [row["loss.beta_max"] for row in rows_of(output)] == ["1.0", "99.0"]
    assert "'--resume', 'latest'" in log.read_text()
