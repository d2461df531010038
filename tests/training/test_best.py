"""The best checkpoint of a run stays, and a run without gain ends; both continue when resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cdpvae.config import parse_settings
from cdpvae.training.best import BestTracker, Rule
from support.runs import merged, run_warm, train

DIRECTIONS = {"nll_q": "-", "active_units": "+", "kl": ""}


def tracker(keep_best: str, patience: int | None = None) -> BestTracker:
    content = {"keep_best": keep_best, "stop_after_no_gain": patience}
    return BestTracker(parse_settings({"training": content}).training, DIRECTIONS)


@pytest.mark.parametrize(
    ("keep_best", "values", "gains"),
    [
        ("nll_q", [3.0, 2.0, 2.0, 2.5, 1.0], [1, 1, 0, 0, 1]),
        ("+nll_q", [3.0, 2.0, 3.5], [1, 0, 1]),
        ("active_units", [3.0, 2.0, 4.0], [1, 0, 1]),
        ("-kl", [float("nan"), 2.0, float("-inf"), 1.0], [0, 1, 0, 1]),
    ],
)
def test_a_gain_is_a_better_value_in_the_direction_of_its_figure(keep_best, values, gains):
    best = tracker(keep_best)
    name = keep_best.lstrip("+-")
    assert [best.see(n, {name: value}) for n, value in enumerate(values)] == [
        bool(g) for g in gains
    ]


def test_the_count_without_gain_starts_again_at_a_gain_and_goes_on_after_a_load():
    best = tracker("nll_q", patience=2)
    over = []
    for step, value in enumerate([3.0, 4.0, 2.0, 2.0, 2.5]):
        again = tracker("nll_q", patience=2)
        again.load_state_dict(json.loads(json.dumps(best.state_dict())))
        best = again
        best.see(step, {"nll_q": value})
        over.append(best.is_over)
    assert over == [False, False, False, False, True]
    assert best.state.step == 2 and "best 2.0000, step 2" in best.reason()


def test_another_figure_starts_from_nothing():
    best = tracker("nll_q")
    best.see(1, {"nll_q": 1.0})
    other = tracker("+kl", patience=1)
    other.load_state_dict(best.state_dict())
    assert other.state.value is None and other.see(2, {"kl": 0.5})


@pytest.mark.parametrize(
    ("keep_best", "words"),
    [
        ("nllq", "there are active_units, kl, nll_q"),
        ("kl", r"write '\+kl' for higher, '-kl' for lower"),
    ],
)
def test_an_unknown_figure_and_one_without_direction_are_refused(keep_best, words):
    with pytest.raises(ValueError, match=words):
        Rule.of(keep_best, DIRECTIONS)


def test_stopping_needs_a_figure():
    with pytest.raises(ValueError, match="stop_after_no_gain=3 needs keep_best"):
        parse_settings({"training": {"stop_after_no_gain": 3}})


@pytest.fixture(scope="module")
def settings(small_settings) -> dict:
    """Every step is evaluated and saved; of the checkpoints one is kept."""
    training = {"eval_steps": 1, "save_steps": 1, "keep_checkpoints": 1, "max_steps": 6}
    return merged(small_settings, training={**training, "sample_rows": 0})


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("checkpoint-*"))


def test_the_link_points_to_the_best_step_and_survives_retention(settings, tmp_path):
    # The largest value, so that the best evaluation is not the last one: training lowers it.
    done = train("python", 1, settings, tmp_path, "--keep-best", "+nll_q")
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "run"
    board = EventAccumulator(str(run / "logs")).Reload()
    values = {event.step: event.value for event in board.Scalars("validation/nll_q")}
    best = max(values, key=values.get)
    assert best < 6, "the last step is the best one: nothing is retired"
    assert (run / "best").is_symlink()
    assert (run / "best").readlink() == Path(f"checkpoint-{best}")
    assert checkpoints(run) == [f"checkpoint-{best}", "checkpoint-6"]
    # The link is a checkpoint to the commands.
    options = ["--checkpoint", str(run / "best"), "--num-rows", "8", "--output", str(tmp_path)]
    done = run_warm("cdpvae.check_latents", *options)
    assert done.returncode in (0, 1), done.stderr[-3000:]
    assert json.loads((tmp_path / "latents.json").read_text())


# The number of validation rows never changes: the first evaluation is the best.
CONSTANT = ["--keep-best", "+rows", "--stop-after-no-gain", "3"]
WATCHED = ["--watch-use", "--check-every", "2"]


@pytest.fixture(scope="module")
def stopped(settings, tmp_path_factory) -> Path:
    """A run that ends for want of gains."""
    root = tmp_path_factory.mktemp("stopped")
    done = train("python", 1, settings, root, *CONSTANT, *WATCHED)
    assert done.returncode == 0, done.stderr[-3000:]
    # The monitor says what it cost also where a run ends before its planned steps.
    (cost,) = [text for text in done.stdout.splitlines() if "of the step time" in text]
    assert "(2 times " in cost
    (line,) = [text for text in done.stdout.splitlines() if ": stopped: " in text]
    assert line == (
        "step 4: stopped: no gain in +rows for 3 evaluations (best 8.0000, step 1; "
        "training.stop_after_no_gain=3)"
    )
    return root


def test_a_run_without_gain_ends_with_a_checkpoint(stopped):
    run = stopped / "run"
    assert len((run / "steps.jsonl").read_text().splitlines()) == 4
    assert checkpoints(run) == ["checkpoint-1", "checkpoint-4"]
    assert (run / "best").readlink() == Path("checkpoint-1")


def test_a_resumed_run_goes_on_counting(stopped, settings, tmp_path):
    first = train("python", 1, settings, tmp_path, *CONSTANT, *WATCHED, "--stop-after", "3")
    assert first.returncode == 0, first.stderr[-3000:]
    second = train("python", 1, settings, tmp_path, *CONSTANT, *WATCHED, "--resume", "latest")
    assert second.returncode == 0, second.stderr[-3000:]
    whole, cut = stopped / "run", tmp_path / "run"
    assert checkpoints(cut) == checkpoints(whole)
    for name in ("steps.jsonl", "checkpoint-4/state.json", "checkpoint-4/README.md"):
        assert (cut / name).read_text() == (whole / name).read_text(), name
    # What has ended stays ended.
    third = train("python", 1, settings, tmp_path, *CONSTANT, *WATCHED, "--resume", "latest")
    assert third.returncode == 0 and "step 4: stopped: no gain" in third.stdout
    assert "of the step time" not in third.stdout
    assert checkpoints(cut) == checkpoints(whole)


def test_an_evaluation_that_stop_after_adds_does_not_count(settings, tmp_path):
    """The uninterrupted run has none there."""
    settings = merged(settings, training={"eval_steps": 2})
    done = train("python", 1, settings, tmp_path, *CONSTANT, "--stop-after", "3")
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((tmp_path / "run" / "checkpoint-3" / "state.json").read_text())
    assert state["best"] == {"rule": "+rows", "value": 8.0, "step": 2, "without_gain": 0}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--keep-best", "nll"], "validation has no such figure, there are active_unit_ratio, "),
        (["--keep-best", "nll_q", "--eval-rows", "0"], "needs validation rows"),
    ],
)
def test_what_validation_does_not_measure_is_refused_before_a_step(
    settings, tmp_path, flags, words
):
    done = train("python", 1, settings, tmp_path, *flags)
    assert done.returncode == 2
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert words in line
    assert not (tmp_path / "run" / "steps.jsonl").exists()


@pytest.mark.launch
def test_all_ranks_stop_at_the_same_step(settings, tmp_path):
    done = train("deepspeed", 2, settings, tmp_path, *CONSTANT, port=29691)
    assert done.returncode == 0, done.stderr[-3000:]
    assert checkpoints(tmp_path / "run") == ["checkpoint-1", "checkpoint-4"]
