"""ZeRO-2 on two ranks equals plain DDP and one process: same losses, same parameters.

The oracle is torch's own DistributedDataParallel, AdamW and gradient clipping, written in
`parity_worker.py`. DeepSpeed#8224 reported silently wrong ZeRO-2 gradients for our topology (one
module used twice a step), so this test stays forever.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from support.runs import merged, run_command

WORKER = Path(__file__).with_name("parity_worker.py")
NO_DROPOUT = {
    "pooling_dropout": 0.0,
    "encoder_dropout": 0.0,
    "projector_dropout": 0.0,
    "lora_dropout": 0.0,
}

# Accumulation 1: no window logic at all; 4: gradients of several micro-batches must add up.
# Checkpointing: the decoder's layers run twice, their hooks must fire once.
# Contrastive: the loss of one rank holds rows of the other, through the gather.
GRID = [(accum, ckpt, nce) for accum in (1, 4) for ckpt in (False, True) for nce in (False, True)]
NAMES = [f"ga{accum}-ckpt{int(ckpt)}-nce{int(nce)}" for accum, ckpt, nce in GRID]
# fp32 sums in another order: the difference that the same data in one and in two halves makes.
# Adam divides by the root of the second moment, so relative errors of small gradients come through
# at the scale of the learning rate: 1e-2 a step, three steps, a relative 1e-3 of it.
LOSS_TOLERANCE = 2e-6
PARAMETER_TOLERANCE = 3e-5


@pytest.fixture(scope="module")
def results(small_settings, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("parity")
    cases = {}
    for name, (accum, checkpointing, contrastive) in zip(NAMES, GRID, strict=True):
        cases[name] = merged(
            small_settings,
            model=NO_DROPOUT,
            loss={"contrastive_weight": 0.1 if contrastive else 0.0},
            augmentation={"augmentation_probability": 1.0 if contrastive else 0.0},
            training={
                "per_device_batch_size": 8,
                "gradient_accumulation_steps": accum,
                "gradient_checkpointing": checkpointing,
                "max_steps": 3,
                "adam_eps": 1e-4,
            },
        )
    (out / "cases.json").write_text(json.dumps(cases))
    arguments = [str(WORKER), str(out / "cases.json"), str(out)]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "29641",
    ]
    for command in (
        [*torchrun, *arguments, "zero"],
        [*torchrun, *arguments, "ddp"],
        [sys.executable, *arguments, "plain"],
        [sys.executable, *arguments, "zero"],
    ):
        done = run_command(command, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
    return {
        (mode, name): torch.load(out / f"{mode}-{name}.pt", weights_only=True)
        for mode in ("zero2", "ddp2", "plain1", "zero1")
        for name in NAMES
    }


@pytest.mark.launch
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["ddp2", "plain1", "zero1"])
def test_zero2_on_two_ranks_equals(results, mode, name):
    ours, theirs = results["zero2", name], results[mode, name]
    # zero counts its own steps: with accumulation 4 in the config it must not take 1 of 4.
    assert ours["steps"] == theirs["steps"] == 3
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=LOSS_TOLERANCE)
    assert len(set(ours["losses"])) == 3
    assert ours["parameters"].keys() == theirs["parameters"].keys()
    for key, value in ours["parameters"].items():
        difference = (value - theirs["parameters"][key]).abs().max()
        assert difference <= PARAMETER_TOLERANCE, key


@pytest.mark.launch
def test_the_grid_has_power(results):
    """Contrastive learning and accumulation change the outcome: equal results mean something."""
    plain = {name: results["plain1", name]["losses"] for name in NAMES}
    assert plain["ga1-ckpt0-nce0"] != plain["ga1-ckpt0-nce1"]
    assert plain["ga1-ckpt0-nce0"] != plain["ga4-ckpt0-nce0"]
