"""The trainer as users start it: `deepspeed`, `torchrun`, one plain process; what it writes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from support.runs import REPOSITORY, launcher, merged, run_command, train

# One process with the same rows a step and module dropout off sees the same data and noise.
NO_DROPOUT = {
    "pooling_dropout": 0.0,
    "encoder_dropout": 0.0,
    "projector_dropout": 0.0,
    "lora_dropout": 0.0,
}


@pytest.fixture(scope="module")
def launched(small_settings, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("launch")
    two = merged(
        small_settings,
        model=NO_DROPOUT,
        training={"max_steps": 4, "eval_steps": 2, "save_steps": 2, "logging_steps": 1},
    )
    one = merged(two, training={"per_device_batch_size": 8})
    runs = {}
    for kind, ranks, settings, port in (
        ("deepspeed", 2, two, 29661),
        ("torchrun", 2, two, 29662),
        ("python", 1, one, 29663),
    ):
        done = train(kind, ranks, settings, root / kind, port=port, fresh=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "done: 4 steps, 0 skipped" in done.stdout
        runs[kind] = root / kind / "run"
    return runs


def curve(run: Path, key: str = "total") -> list[float]:
    return [json.loads(line)[key] for line in (run / "steps.jsonl").read_text().splitlines()]


@pytest.mark.launch
def test_every_launcher_gives_the_same_run(launched):
    assert curve(launched["deepspeed"]) == curve(launched["torchrun"])
    # Sums of fp32 in another order, through four optimizer steps.
    assert curve(launched["python"]) == pytest.approx(curve(launched["deepspeed"]), rel=1e-4)


@pytest.mark.launch
def test_what_a_run_writes(launched):
    run = launched["deepspeed"]
    assert (run / "latest").read_text().strip() == "checkpoint-4"
    assert sorted(p.name for p in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    checkpoint = run / "checkpoint-4"
    for name in (
        "config.json",
        "heads.safetensors",
        "adapter_model.safetensors",
        "adapter_config.json",
        "settings.json",
        "state.json",
        "manifest.json",
        "rank_0.pt",
        "rank_1.pt",
        "tokenizer/tokenizer.json",
    ):
        assert (checkpoint / name).exists(), name
    base = checkpoint / "deepspeed"
    assert sum(p.stat().st_size for p in base.rglob("*.pt")) < 4_000_000, "holds the frozen base"


@pytest.mark.launch
def test_tensorboard_has_every_metric(launched):
    board = EventAccumulator(str(launched["deepspeed"] / "logs"))
    board.Reload()
    tags = set(board.Tags()["scalars"])
    wanted = (
        {
            f"train/{name}"
            for name in (
                "recon_loss",
                "kl_loss",
                "kl_raw",
                "beta",
                "beta_elbo",
                "active_dims",
                "bow_loss",
                "neg_elbo",
                "grad_norm",
                "learning_rate",
                "tokens_per_second",
                "mfu",
                "peak_memory_gib",
            )
        }
        | {
            f"validation/{name}"
            for name in (
                "nll_q",
                "nll_mu",
                "neg_elbo",
                "kl",
                "z_use_shuffled",
                "z_use_prior",
                "z_use_zero",
                "bleu4",
                "rouge_l",
                "active_unit_ratio",
            )
        }
        | {f"grad_norm_at_mu/{name}" for name in ("recon", "kl", "bow")}
    )
    assert not wanted - tags
    assert sum(tag.startswith("kl_per_dim/") for tag in tags) == 8
    assert all(event.value == 0 for event in board.Scalars("train/mfu")), "a guess for CPU"
    assert all(math.isfinite(e.value) for tag in wanted for e in board.Scalars(tag))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--learning-rat", "1"], ["learning-rat"]),
        (["--precision", "fp8"], ["fp8", "bf16"]),
        (["--max-steps", "1"], ["beta_cycles=2", "1 steps"]),
        (["--backbone", "no/such/place"], ["no/such/place"]),
        (["--processed-dir", "nowhere"], ["nowhere"]),
        (["--resume", "latest"], ["latest"]),
        (["--per-device-batch-size", "1000"], ["1000"]),
        (["--ds-config", "nothing.json"], ["nothing.json"]),
    ],
)
def test_a_mistake_is_one_clear_line(small_settings, tmp_path, flags, words):
    done = train("python", 1, small_settings, tmp_path, *flags)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in lines[0]


def test_print_config_needs_no_data(tmp_path):
    done = run_command(
        [*launcher("python", 1, 0), "cdpvae.train", "--print-config", "--learning-rate", "0.5"]
    )
    assert done.returncode == 0
    assert json.loads(done.stdout)["training"]["learning_rate"] == 0.5


@pytest.mark.launch
def test_an_existing_run_is_not_overwritten(small_settings, launched):
    settings = merged(small_settings, training={"output_dir": str(launched["python"])})
    done = train("python", 1, settings, launched["python"].parent)
    assert done.returncode == 2
    assert "--resume" in done.stderr


def test_hostfile_command_line(tmp_path):
    """Several nodes, as far as one machine can go: the command that would start them."""
    hostfile = tmp_path / "hosts"
    hostfile.write_text("node1 slots=2\nnode2 slots=2\n")
    done = run_command(
        ["env", "DRY_RUN=1", "./launch/train_multinode.sh", str(hostfile), "--phase", "1"]
    )
    assert done.returncode == 0
    assert done.stdout.split() == [
        "deepspeed",
        "--hostfile",
        str(hostfile),
        "--module",
        "cdpvae.train",
        "--phase",
        "1",
    ]
    bad = run_command(["./launch/train_multinode.sh", str(tmp_path / "none")])
    assert bad.returncode == 2 and "cannot be read" in bad.stderr


def test_the_gpu_script_passes_settings_on_and_stops_its_workers(tmp_path):
    """With a stand-in for the launcher that starts a worker and waits, as the real one does."""
    launcher_log, worker_pid = tmp_path / "arguments", tmp_path / "worker"
    stand_in = tmp_path / "deepspeed"
    stand_in.write_text(
        f'#!/bin/bash\necho "$@" $PYTORCH_CUDA_ALLOC_CONF > {launcher_log}\n'
        f"sleep 300 &\necho $! > {worker_pid}\nwait\n"
    )
    stand_in.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("PYTORCH_CUDA_ALLOC_CONF", None)
    script = subprocess.Popen(
        ["./launch/train_2xl40s.sh", "--phase", "1"], cwd=REPOSITORY, env=environment
    )
    deadline = time.monotonic() + 20
    while not (worker_pid.exists() and worker_pid.read_text().strip()):
        assert time.monotonic() < deadline, "the stand-in never started"
        time.sleep(0.05)
    arguments = launcher_log.read_text()
    assert "--ds-config ds_configs/zero2_2xl40s.json --phase 1" in arguments
    # Else memory of lengths that differ in every micro-batch is cut to pieces.
    assert arguments.split()[-1] == "expandable_segments:True"
    worker = int(worker_pid.read_text())
    script.terminate()
    assert script.wait(timeout=20) != 0
    while Path(f"/proc/{worker}").exists() and "Z" not in _state(worker):
        assert time.monotonic() < deadline, "the worker is an orphan"
        time.sleep(0.05)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return "Z"
