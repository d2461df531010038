"""The tuner: which candidate it takes and what it writes. The clock is the test's own."""

import csv
import dataclasses
import json
import math
import time
from pathlib import Path

import pytest
import torch

from cdpvae_kernels import tune
from cdpvae_kernels.bag_of_words import triton_kernels as bow_kernels
from cdpvae_kernels.common import launch_configs
from cdpvae_kernels.common.launch_configs import launch_config, read_table
from cdpvae_kernels.common.tuning import Room, Shapes, Tunable
from support.triton import DEVICE

# No size is a multiple of a block.
SMALL = Shapes(
    vocab=100, width=24, latent=8, rows=3, chunk=4, tokens=10, prompts=2, dtype=torch.float32
)
USUAL_LATENT = dataclasses.replace(SMALL, latent=64)
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
    assert choice.failed == 2 and "2 candidates do not run" in choice.line()


def test_a_candidate_that_does_not_compile_is_left_out_and_the_others_go_on():
    from triton.compiler.errors import CompilationError

    errors = {1: CompilationError("", None, "no"), 2: RuntimeError("PassManager::run failed")}

    def launch(config):
        ran.append(config)
        if config["BLOCK_V"] == 16:
            raise errors[config["num_stages"]]

    ran, clock = clock_of(lambda c: 1.0)
    assert tune.tune(tunable(launch), DEVICE, 1, clock).failed == 2
    # The one that counts now must run: there is nothing to compare with.
    with pytest.raises(RuntimeError, match="its present configuration .* does not run"):
        tune.tune(
            tunable(lambda config: launch({"BLOCK_V": 16, "num_stages": 2})), DEVICE, 1, clock
        )


def test_what_cannot_fit_is_not_even_compiled():
    """Of the slowest to compile: a block of 64 x 256 without tensor cores, 14,086 spills."""
    (many,) = tune.find_tunables(USUAL_LATENT, DEVICE, ["bow.errors.many_fp32"])
    small = {"BLOCK_B": 16, "BLOCK_V": 32, "num_warps": 8, "num_stages": 1, "PROGRAMS": 132}
    large = {**small, "BLOCK_B": 64, "BLOCK_V": 256}
    assert many.fits(small, math.inf) and not many.fits(large, math.inf)
    # Shared memory is the other limit: 3 stages of 256 x 64 in fp32 are 213 KB.
    assert not many.fits({**large, "num_stages": 3, "num_warps": 32}, 101376)
    ran, clock = clock_of(lambda c: 1.0)
    one_other = {"BLOCK_V": (256,), "num_warps": (4,), "num_stages": (1,)}
    impossible = dataclasses.replace(many, config=ROWS, candidates=one_other)
    impossible = dataclasses.replace(
        impossible, launch=ran.append, room=lambda config: Room(10**9, 0)
    )
    choice = tune.tune(impossible, DEVICE, 1, clock)
    assert choice.failed == 1 and {str(c) for c in ran} == {str(launch_config(ROWS, DEVICE))}


def test_the_room_of_a_block_is_estimated_from_below():
    """The measured table: shared memory is at least, registers are at least what was estimated."""
    by_name = {t.config: t for t in tune.find_tunables(USUAL_LATENT, DEVICE, ())}
    table = Path(__file__).parents[2] / "benchmarks" / "results" / "kernel_resources.csv"
    compared = 0
    for row in csv.DictReader(table.open()):
        # The tuner's operands are all of one dtype.
        name, *variant = row["kernel"].split()
        one = by_name[name]
        if one.room is None or "x" in variant:
            continue
        config = {key: int(value) for key, value in (e.split("=") for e in row["config"].split())}
        room = one.room(config)
        assert room.shared <= int(row["shared"]), row
        assert room.numbers <= 32 * config["num_warps"] * int(row["registers"]), row
        compared += 1
    assert compared >= 24


def test_the_number_of_programs_is_no_reason_to_compile_again():
    assert not {"PROGRAMS"} & set(bow_kernels.errors_kernel.arg_names)
    assert not {"PROGRAMS"} & set(bow_kernels.log_sum_exp_kernel.arg_names)


def test_stages_are_tried_only_where_a_product_is_pipelined():
    for one in tune.find_tunables(SMALL, DEVICE, ()):
        pipelined = one.config.startswith(("bow.errors", "bow.log_sum_exp", "bow.head"))
        assert (len(one.candidates["num_stages"]) > 1) == pipelined, one.config


def test_time_that_runs_out_leaves_candidates_untried(monkeypatch):
    """Each launch takes a second; of five candidates two are compiled in half of four seconds."""
    now = [0.0]
    monkeypatch.setattr(tune.time, "monotonic", lambda: now[0])

    def launch(config):
        ran.append(config)
        now[0] += 1.0

    ran, clock = clock_of(lambda c: 1.0)
    choice = tune.tune(tunable(launch), DEVICE, 10, clock, seconds=4.0)
    assert choice.untried == 2 and "(2 not tried)" in choice.line()
    # One round of the three that run, whatever it takes; then the time is over.
    assert len(ran) == 3 + 3


def test_the_clock_measures_the_gpu_and_not_the_host(monkeypatch):
    """The GPU is busy before the first event is made, so that the launch waits for it."""
    did = []

    class Event:
        def __init__(self, enable_timing):
            self.name = f"event {len(did)}"

        def record(self):
            did.append("record")

        def synchronize(self):
            did.append("wait")

        def elapsed_time(self, end):
            return 1.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: did.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: did.append("busy"), raising=False)
    assert tune.cuda_clock(lambda: did.append("launch")) == 1.0
    assert did == ["synchronize", "busy", "record", "launch", "record", "wait"]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="there is no GPU whose clock to read")
def test_a_slow_host_does_not_count():
    x = torch.zeros(16, device=DEVICE)

    def call():
        time.sleep(2e-4)
        x.add_(1.0)

    call()
    assert min(tune.cuda_clock(call) for _ in range(5)) < 0.1


def test_what_is_known_is_written_before_the_run_ends(monkeypatch, tmp_path, capsys):
    """The second kernel breaks the GPU: the first one's choice is in the table all the same."""
    path = tmp_path / "mine.json"
    monkeypatch.setenv(launch_configs.USER_TABLE_VARIABLE, str(path))
    for name, value in (("is_available", True), ("current_device", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    best = {"BLOCK_V": 64, "num_warps": 2, "num_stages": 1}
    shares = []

    def tuned(one, device, rounds, clock, seconds):
        shares.append(seconds)
        if len(shares) == 2:
            raise RuntimeError("an illegal memory access was encountered")
        return tune.Choice(one.config, {}, 2.0, best, 1.0, 0, 0)

    monkeypatch.setattr(tune, "find_tunables", lambda *_: [tunable(), tunable()])
    monkeypatch.setattr(tune, "tune", tuned)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        tune.main(["--minutes", "2"])
    read_table.cache_clear()
    assert json.loads(path.read_text()) == {"Some GPU": {ROWS: best}}
    # Two kernels, two minutes: half of them each, and what is left of the first for the second.
    assert shares[0] == pytest.approx(60, abs=1) and shares[1] == pytest.approx(120, abs=1)


def test_what_moves_most_bytes_is_tuned_first():
    found = tune.find_tunables(SMALL, DEVICE, ())
    assert [t.bytes for t in found] == sorted((t.bytes for t in found), reverse=True)


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
