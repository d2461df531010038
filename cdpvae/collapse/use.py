"""Keep what z was worth to the decoder on the last held-out rows, and compare it with its price.

The use of z in a row is -log p(x|z') + log p(x|z), nats, z' being another row's z. Both terms are
of the same row, so what makes a text hard leaves the difference, and the standard error is that of
paired data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cdpvae.config import CollapseConfig

# The 97.5 % quantile of the normal distribution.
QUANTILE = 1.96


@dataclass(frozen=True)
class Use:
    """The use of z at one check, nats per sequence.

    mean, standard_error: of the paired differences; the error is infinite below two rows.
    kl: mean KL(q(z|x) || p(z)) of the same rows.
    min_use: the least healthy use, `min_use_share` of the KL but at least the setting `min_use`.
    rows: differences in the window, repeated rows counted each time.
    counts: the window is full and the grace period over.
    """

    mean: float
    standard_error: float
    kl: float
    min_use: float
    rows: int
    counts: bool

    @property
    def upper_limit(self) -> float:
        """The upper end of the 95 % interval."""
        return self.mean + QUANTILE * self.standard_error

    @property
    def is_low(self) -> bool:
        """Whether z is not used: the whole interval lies below `min_use`."""
        return self.counts and self.upper_limit < self.min_use

    @property
    def is_doubtful(self) -> bool:
        """Whether indicators of the posterior alone may move weights: below twice `min_use`."""
        return self.counts and self.mean < 2 * self.min_use

    def figures(self) -> dict[str, float]:
        """Return what is logged, by name."""
        return {
            "use": self.mean,
            "use_upper_limit": self.upper_limit,
            "use_kl": self.kl,
            "min_use": self.min_use,
            "use_rows": float(self.rows),
            "use_counts": float(self.counts),
        }

    def __str__(self) -> str:
        """Write one phrase."""
        text = f"use of z {self.mean:.2f}, at most {self.upper_limit:.2f} nats in {self.rows} rows"
        return f"{text}, least healthy {self.min_use:.2f}" + ("" if self.counts else ", not judged")


class UseWindow:
    """Hold the differences of the last checks.

    config: thresholds, size of the window, share of the plan that is grace.
    held_out_rows: how many rows there are to rotate through.
    total_steps: of the planned schedule.
    """

    def __init__(self, config: CollapseConfig, held_out_rows: int, total_steps: int) -> None:
        self.config, self.held_out_rows = config, held_out_rows
        self.grace_steps = int(config.grace_ratio * total_steps)
        self.differences = torch.zeros(0, dtype=torch.float64)
        self.kl = torch.zeros(0, dtype=torch.float64)
        self.next_row = 0

    def add(self, differences: Tensor, kl: Tensor) -> None:
        """Take in the rows of one check, and move on by as many held-out rows.

        differences, kl: (R,) nats, of the rows from `next_row` on, of all ranks. A check larger
        than the window stays whole.
        """
        keep = max(self.config.use_window_rows, len(differences))
        both = torch.cat([self.differences, differences.detach().to("cpu", torch.float64)])
        kls = torch.cat([self.kl, kl.detach().to("cpu", torch.float64)])
        # The window is copied so that what has left frees its memory.
        self.differences, self.kl = both[-keep:].clone(), kls[-keep:].clone()
        self.next_row = (self.next_row + len(differences)) % self.held_out_rows

    def judge(self, step: int) -> Use:
        """Return the use over the window. step: optimizer steps taken."""
        # A row met again tells little new: the error is that of as many rows as there are.
        config, rows = self.config, len(self.differences)
        distinct = min(rows, self.held_out_rows)
        error = math.inf
        if distinct >= 2:
            error = float(self.differences.std()) / math.sqrt(distinct)
        # What is spent on z says how much use is to be expected of it.
        mean = float(self.differences.mean()) if rows else 0.0
        kl = float(self.kl.mean()) if rows else 0.0
        return Use(
            mean=mean,
            standard_error=error,
            kl=kl,
            min_use=max(config.min_use, config.min_use_share * kl),
            rows=rows,
            counts=rows >= config.use_window_rows and step > self.grace_steps,
        )

    def first_judged_step(self, rows_per_check: int) -> int:
        """Return the first check whose use counts, as an optimizer step."""
        every = self.config.check_every
        checks = math.ceil(self.config.use_window_rows / rows_per_check)
        return max(checks, self.grace_steps // every + 1) * every

    def state_dict(self) -> dict[str, Any]:
        """Return the window and the place in the held-out rows."""
        return {"differences": self.differences, "kl": self.kl, "next_row": self.next_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly there."""
        self.differences, self.kl = state["differences"].clone(), state["kl"].clone()
        self.next_row = state["next_row"] % self.held_out_rows
