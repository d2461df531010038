"""In a step the host never waits for the device: no operation makes it read a value.

On a CPU the operations are watched that would wait on a GPU, and argument checks, which read what
lies in the host's memory anyway, are told that nothing does. On a GPU torch itself watches.
"""

from __future__ import annotations

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cdpvae.batch import StepSchedule
from cdpvae.config import parse_settings
from cdpvae.loss.objective import build_objective
from cdpvae.tasks.text_vae.module import TrainingModule
from cdpvae_kernels.common import checks
from support.triton import DEVICE

# What tells the host how many elements there are, or what one holds.
WAITING = {"nonzero", "_local_scalar_dense", "masked_select", "unique_dim", "_unique2", "equal"}


class Waits(TorchDispatchMode):
    """Names of the operations that would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        # An index of booleans is counted first.
        indices = args[1] if name.startswith(("index.", "index_put")) or name == "index" else []
        masks = [i for i in indices if i is not None and i.dtype in (torch.bool, torch.uint8)]
        if name in WAITING or masks:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def training_module(make_model, reduction):
    settings = parse_settings(
        {
            "model": {"kernels": "auto" if DEVICE.type == "cuda" else "reference"},
            "loss": {"bow_reduction": reduction},
        }
    )
    model = make_model().float().to(DEVICE).train()
    model.impl = settings.model.kernel_impl
    objective = build_objective(settings, model.latent.flat_dim, world_size=1)
    return TrainingModule(model, objective, seed=3, world_size=1)


def schedule_of(batch):
    return StepSchedule(
        step=0,
        epoch=0,
        beta=1.0,
        weights={"bow": 1.5, "contrastive": 0.1, "order": 0.0},
        word_dropout=0.4,
        target_divisor=float(batch.targets.numel()),
    )


@pytest.mark.parametrize("reduction", ["bce", "categorical"])
def test_a_micro_batch_never_waits(make_model, batch, reduction, monkeypatch):
    module, schedule = training_module(make_model, reduction), schedule_of(batch)
    batch = batch.to(DEVICE)
    if DEVICE.type == "cuda":
        # Once before: the first call compiles, and reads launch configurations.
        module(batch, schedule).total.backward()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            module(batch, schedule).total.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    readable = checks.readable
    for place in [m for m in sys.modules.values() if getattr(m, "readable", None) is readable]:
        monkeypatch.setattr(place, "readable", lambda tensor: False)
    with Waits() as waits:
        module(batch, schedule).total.backward()
    assert waits.names == []
