"""Measure the use of z on a few held-out rows during training, and what that costs in time.

Has no effect on training: modules are in eval mode and noise is Philox, so that no generator of
torch is advanced.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque

import torch
from torch import Tensor

from cdpvae.collapse import UseWindow
from cdpvae.config import Settings
from cdpvae.data import PreprocessedDataset, VAECollator
from cdpvae.evaluation.likelihood import EVALUATION_EPOCH, sequence_nll
from cdpvae.models.text_vae import LlamaSoftPromptVAE
from cdpvae.training.distributed import World, all_gather_rows


class UseProbe:
    """Decode held-out rows with their own z and with another row's.

    Every rank takes as many rows as every other, at least two, in one pass of its own: a pass may
    hold collectives.

    settings: of the run.
    world: this rank among its peers.
    model: what is measured, in whatever mode.
    split: the held-out rows, at least two.
    """

    def __init__(
        self,
        settings: Settings,
        world: World,
        model: LlamaSoftPromptVAE,
        split: PreprocessedDataset,
    ) -> None:
        self.seed, self.world = settings.training.seed, world
        self.model, self.split = model, split
        share = math.ceil(settings.collapse.use_rows / world.world_size)
        self.rows_per_rank = min(max(2, share), len(split))

    @property
    def rows_per_check(self) -> int:
        """How many rows all ranks measure together."""
        return self.rows_per_rank * self.world.world_size

    @torch.no_grad()
    def measure(self, first_row: int) -> tuple[Tensor, Tensor]:
        """Return NLL(z of another row) - NLL(own z) and KL of the rows from `first_row` on.

        Both (R,) fp64 nats on the CPU, the same on every rank; R is `rows_per_check`. After the
        last held-out row follows the first one.
        """
        # This rank's rows.
        start = first_row + self.world.rank * self.rows_per_rank
        indices = [(start + n) % len(self.split) for n in range(self.rows_per_rank)]
        batch = VAECollator()(self.split.rows(indices), indices).to(self.world.device)
        model, texts = self.model, (batch.response, batch.instruction)
        with model.evaluating():
            # The z that training would draw, without dropout.
            code = model.infer(batch.instruction)
            noise = model.training_noise(batch.sample_index, seed=self.seed, epoch=EVALUATION_EPOCH)
            z = model.latent.sample(code, noise)
            # The same rows twice, each with its neighbour's z and with its own.
            difference = sequence_nll(model, z.roll(1, 0), *texts).double()
            difference -= sequence_nll(model, z, *texts).double()
            rate = model.latent.penalties(code).get("kl")
        kl = torch.zeros_like(difference)
        if rate is not None:
            kl = rate.double().reshape(len(difference), -1).sum(1)
        # One collective for both.
        both = all_gather_rows(torch.stack([difference, kl], 1)).cpu()
        return both[:, 0], both[:, 1]


class PassTimes:
    """Time the passes against the steps; what happens between steps else does not enter."""

    def __init__(self) -> None:
        self.passes: list[float] = []
        # A median of the last steps: some of them are followed by an evaluation or a checkpoint.
        self.steps: deque[float] = deque(maxlen=1000)
        self.last: float | None = None

    def step_ends(self) -> None:
        """Note that a training step has ended."""
        if self.last is not None:
            self.steps.append(time.perf_counter() - self.last)

    def step_begins(self) -> None:
        """Note that the next training step begins."""
        self.last = time.perf_counter()

    def describe(self, check_every: int) -> str:
        """Return one line: seconds of a pass and its share of the step time."""
        if not self.passes or not self.steps:
            return "collapse monitor: the use of z was not measured"
        one, step = statistics.median(self.passes), statistics.median(self.steps)
        share = one / (check_every * step)
        return (
            f"collapse monitor: the use of z took {share:.1%} of the step time "
            f"({len(self.passes)} times {one:.3f} s, once in {check_every} steps of {step:.3f} s)"
        )


def watched_use(
    settings: Settings,
    world: World,
    model: LlamaSoftPromptVAE,
    split: PreprocessedDataset | None,
    total_steps: int,
) -> tuple[UseWindow | None, UseProbe | None, str]:
    """Return the window and the probe of the use of z, and one line that says what is watched.

    settings: of the run.
    world: this rank among its peers.
    model: what is measured.
    split: the held-out rows, or None.
    total_steps: of the planned schedule.

    Neither of them and no line where the use is not to be watched; a line alone where there are
    no rows for it.
    """
    # Without rows the posterior alone is judged.
    config = settings.collapse
    if not (config.watch_use and config.enable_collapse_monitoring):
        return None, None, ""
    reason = ""
    if not settings.training.eval_rows:
        reason = "eval_rows is 0"
    elif split is None or len(split) < 2:
        reason = "there are fewer than two validation rows"
    if reason or split is None:
        return None, None, f"collapse monitor: judges the posterior alone, not the use: {reason}"
    # A plan too short for the window should not come as a surprise.
    window, probe = (
        UseWindow(config, len(split), total_steps),
        UseProbe(settings, world, model, split),
    )
    first, rows = window.first_judged_step(probe.rows_per_check), probe.rows_per_check
    line = f"collapse monitor: use of z measured on {rows} rows every {config.check_every} steps, "
    if first > total_steps:
        return window, probe, line + f"never judged: that takes {first} steps; raise use_rows"
    return window, probe, line + f"judged from step {first} on"
