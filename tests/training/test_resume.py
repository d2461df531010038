"""A resumed run equals the uninterrupted one, bit for bit.

New processes through the launcher, two ranks, stopped in mid-epoch with dropout on, a queue of
negatives that is not empty and an intervention that has fired.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cdpvae.data import PreprocessedDataset
from support.runs import merged, train

pytestmark = pytest.mark.launch

STEPS, STOP = 8, 5
# Thresholds nothing can meet: the first check already counts as a collapse.
ALWAYS_COLLAPSING = {"check_every": 2, "patience": 1, "min_au_ratio": 1.0, "au_variance": 1e6}
# The use of z is measured at every check, and judged from the second one on.
WATCHED = {
    "watch_use": True,
    "use_rows": 6,
    "use_window_rows": 12,
    "grace_ratio": 0,
    "min_use": 1e6,
}


@pytest.fixture(scope="module")
def runs(small_settings, tmp_path_factory) -> dict[str, Path]:
    """Directories of the uninterrupted run and of the one stopped after STOP steps."""
    root = tmp_path_factory.mktemp("resume")
    settings = merged(
        small_settings,
        loss={"queue_size": 24},
        augmentation={"augmentation_probability": 0.7},
        collapse=ALWAYS_COLLAPSING | WATCHED,
        training={"max_steps": STEPS},
    )
    whole = train("deepspeed", 2, settings, root / "whole", port=29651)
    assert whole.returncode == 0, whole.stderr[-3000:]
    first = train("deepspeed", 2, settings, root / "cut", "--stop-after", str(STOP), port=29652)
    assert first.returncode == 0, first.stderr[-3000:]
    second = train("deepspeed", 2, settings, root / "cut", "--resume", "latest", port=29653)
    assert second.returncode == 0, second.stderr[-3000:]
    assert f"at step {STOP}" in second.stdout
    return {"whole": root / "whole" / "run", "cut": root / "cut" / "run"}


def same(a, b, path: str = "") -> None:
    """Bitwise equality of nested state."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{path}/{index}")
    elif hasattr(a, "__dict__"):
        same(vars(a), vars(b), path)
    else:
        assert a == b, path


def test_the_interruption_was_where_it_should_be(runs):
    state = json.loads((runs["cut"] / f"checkpoint-{STOP}" / "state.json").read_text())
    assert state["step"] == STOP
    assert state["step_in_epoch"] > 0, "stopped at the border of an epoch"
    shared = torch.load(runs["cut"] / f"checkpoint-{STOP}" / "rank_0.pt")["shared"]
    settings = json.loads((runs["cut"] / f"checkpoint-{STOP}" / "settings.json").read_text())
    queue = [v for v in _leaves(shared["loss"]) if isinstance(v, torch.Tensor)]
    assert any(tensor.abs().sum() > 0 for tensor in queue), "the queue is empty"
    weights = [v for v in _leaves(shared["interventions"]) if isinstance(v, float)]
    assert settings["loss"]["bow_weight"] not in weights, "no intervention has fired"


def _leaves(value) -> list:
    if isinstance(value, dict):
        return [leaf for v in value.values() for leaf in _leaves(v)]
    return [value]


def test_loss_curve_is_equal(runs):
    curves = {name: (path / "steps.jsonl").read_text() for name, path in runs.items()}
    assert len(curves["whole"].splitlines()) == STEPS
    assert curves["whole"] == curves["cut"]


def test_parameters_are_equal(runs):
    for name in ("heads.safetensors", "adapter_model.safetensors"):
        contents = [(path / f"checkpoint-{STEPS}" / name).read_bytes() for path in runs.values()]
        assert contents[0] == contents[1], name


def test_state_of_every_rank_is_equal(runs):
    """RNG of both ranks, monitor, interventions, queue, loader position."""
    for rank in (0, 1):
        states = [
            torch.load(path / f"checkpoint-{STEPS}" / f"rank_{rank}.pt") for path in runs.values()
        ]
        same(*states)
    ranks = [
        torch.load(runs["whole"] / f"checkpoint-{STEPS}" / f"rank_{rank}.pt")["rng"]["torch"]
        for rank in (0, 1)
    ]
    assert not torch.equal(*ranks), "both ranks draw the same dropout masks"


def test_both_ranks_hold_the_same_use_of_z(runs):
    """Each has measured three of six rows; the differences of both are in both windows."""
    monitors = [
        torch.load(runs["cut"] / f"checkpoint-{STEPS}" / f"rank_{rank}.pt")["shared"]["monitor"]
        for rank in (0, 1)
    ]
    same(*monitors)
    use = monitors[0]["use"]
    settings = json.loads((runs["cut"] / "settings.json").read_text())
    rows = len(PreprocessedDataset(settings["data"]["processed_dir"], "validation"))
    assert use["next_row"] == 24 % rows and len(use["differences"]) == 12
    assert use["differences"].unique().numel() > 6
    checks = [json.loads(line) for line in (runs["cut"] / "checks.jsonl").read_text().splitlines()]
    assert [check["use_counts"] for check in checks] == [0.0, 1.0, 1.0, 1.0]
    whole = (runs["whole"] / "checks.jsonl").read_text()
    assert whole == (runs["cut"] / "checks.jsonl").read_text()


def test_optimizer_shards_are_equal(runs):
    shards = sorted((runs["whole"] / f"checkpoint-{STEPS}" / "deepspeed").rglob("*optim*.pt"))
    assert len(shards) == 2
    for shard in shards:
        other = runs["cut"] / shard.relative_to(runs["whole"])
        states = [
            torch.load(path, weights_only=False)["optimizer_state_dict"] for path in (shard, other)
        ]
        same(*states)
