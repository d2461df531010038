"""The tuner: which candidate it takes and what it writes. The clock is the test's own."""

import json

import pytest
import torch

from cdpvae_kernels import tune
from cdpvae_kernels.common import launch_configs
from cdpvae_kernels.common.launch_configs import launch_config, read_table
from cdpvae_kernels.common.tuning import Shapes, Tunable
from support.triton import DEVICE

# No size is a multiple of a block.
SMALL = Shapes(
    vocab=100, width=24, latent=8, rows=3, chunk=4, tokens=10, prompts=2, dtype=torch.float32
)
ROWS = "linear_cross_entropy.rows"


def tunable(launch=lambda config: None):
    candidates = {"BLOCK_V": (16, 32), "num_warps": (4,), "num_stages": (1, 2)}
    return Tunable(ROWS, candidates, launch, bytes=1000)


def clock_of(times):
    """A clock that knows what each configuration takes."""
    ran = []

    def clock(call):
        call()
        return times(ran[-1])

    return ran, clock


def test_the_fastest_candidate_is_taken():
    ran, clock = clock_of(lambda c: 1.0 if c == {**best, "num_warps": 4} else 2.0)
    best = {"BLOCK_V": 32, "num_stages": 2}
    choice = tune.tune(tunable(ran.append), DEVICE, 3, clock)
    assert choice.best == {**best, "num_warps": 4}
    assert (choice.before_ms, choice.best_ms) == (2.0, 1.0)
    assert choice.before == launch_config(ROWS, DEVICE)
    assert choice.gigabytes_per_second == pytest.approx(1000 / 1e-3 / 1e9)
    assert "was 2.0000" in choice.line()


def test_a_gain_below_two_percent_changes_nothing():
    present = launch_config(ROWS, DEVICE)
    ran, clock = clock_of(lambda c: 1.0 if c == present else 0.99)
    choice = tune.tune(tunable(ran.append), DEVICE, 3, clock)
    assert choice.best == present and "kept" in choice.line()


def test_candidates_are_interleaved_so_that_a_drift_hits_all_alike():
    ran, clock = clock_of(lambda c: float(len(ran)))
    tune.tune(tunable(ran.append), DEVICE, 2, clock)
    timed = ran[5:]  # after one run each of the five to see that they work
    assert timed[:5] == timed[5:] and len({str(c) for c in timed[:5]}) == 5


def test_what_does_not_fit_is_left_out_and_counted():
    from triton.runtime.errors import OutOfResources

    def launch(config):
        ran.append(config)
        if config["BLOCK_V"] == 16:
            raise OutOfResources(200000, 101376, "shared memory")

    ran, clock = clock_of(lambda c: 1.0)
    choice = tune.tune(tunable(launch), DEVICE, 1, clock)
    assert choice.failed == 2 and "2 candidates do not fit" in choice.line()


def test_every_kernel_runs_with_every_candidate_where_it_is_interpreted_or_fits():
    """The launches the tuner makes are real: each kernel of the table once, on small data."""
    # A kernel without an entry, or an entry without a kernel, would show here.
    found = tune.find_tunables(SMALL, DEVICE, only=())
    assert {t.config for t in found} == set(read_table(launch_configs.SHIPPED)["default"])
    for one in found:
        config = launch_config(one.config, DEVICE)
        assert set(one.candidates) == set(config), one.config
        one.launch(config)


def test_the_table_is_merged_and_then_counts(monkeypatch, tmp_path):
    path = tmp_path / "folder" / "mine.json"
    monkeypatch.setenv(launch_configs.USER_TABLE_VARIABLE, str(path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    path.parent.mkdir()
    # A table that already holds another GPU and another kernel.
    other = {"BLOCK_D": 1, "num_warps": 1, "num_stages": 1}
    path.write_text(json.dumps({"Other GPU": {ROWS: other}, "Some GPU": {"x.y": other}}))
    best = {"BLOCK_V": 64, "num_warps": 2, "num_stages": 1}
    choice = tune.Choice(ROWS, {}, 2.0, best, 1.0, 0, 0)
    tune.write([choice], "Some GPU", path)
    written = json.loads(path.read_text())
    assert written == {"Other GPU": {ROWS: other}, "Some GPU": {"x.y": other, ROWS: best}}
    assert launch_config(ROWS, torch.device("cuda", 0)) == best
    read_table.cache_clear()


def test_an_unknown_kernel_is_one_line():
    with pytest.raises(ValueError, match="--only nothing: no such kernel; known are .*linear_c"):
        tune.find_tunables(SMALL, DEVICE, only=["nothing"])


@pytest.mark.skipif(DEVICE.type == "cuda", reason="here there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        tune.main([])
    assert "there is no CUDA GPU to measure on" in capsys.readouterr().err
