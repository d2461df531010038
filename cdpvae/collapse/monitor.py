"""Is the posterior collapsing? Indicators over a sliding window of posteriors.

The window holds posteriors of all ranks, so every rank sees the same and decides the same. The
random draws of the mutual information depend on the number of the check alone: a resumed run
repeats them.

Legend: N rows of the window, Z latent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cdpvae.config import CollapseConfig
from cdpvae.metrics import active_units, kl_per_dim, mutual_information


class Level(IntEnum):
    """How bad it is."""

    NONE = 0
    MILD = 1
    MODERATE = 2
    SEVERE = 3


@dataclass(frozen=True)
class CollapseMetrics:
    """One check. au, au_ratio: active units and their share. mi: nats, below its cap mi_cap =
    log N. mean_kl: nats per dimension. infonce_bound: log K - InfoNCE of anchor against augmented
    means, where they were given. indicators: the thresholds missed.

    is_collapsing: the level was above NONE in `patience` checks in a row.
    """

    au: int
    au_ratio: float
    mi: float
    mi_cap: float
    mean_kl: float
    level: Level
    is_collapsing: bool
    indicators: tuple[str, ...]
    notes: tuple[str, ...]
    infonce_bound: float | None = None

    def __str__(self) -> str:
        """One line."""
        missed = ", ".join(self.indicators) or "none"
        return (
            f"collapse level {int(self.level)} (missed: {missed}): AU {self.au_ratio:.0%}, "
            f"MI {self.mi:.2f} of at most {self.mi_cap:.2f} nats, KL {self.mean_kl:.3f} nats/dim"
        )


class CollapseMonitor:
    """Active units (Burda et al. 2016), aggregated-posterior MI (Hoffman & Johnson 2016), mean KL.

    latent_dim: Z. config: thresholds, window and patience; the description's by default.
    """

    def __init__(self, latent_dim: int, config: CollapseConfig | None = None):
        self.latent_dim = latent_dim
        self.config = config or CollapseConfig()
        self._mu = torch.zeros(0, latent_dim)
        self._logvar = torch.zeros(0, latent_dim)
        self.checks = 0
        self.in_a_row = 0

    def update(
        self, mu: Tensor, logvar: Tensor, mu_augmented: Tensor | None = None
    ) -> CollapseMetrics:
        """`add`, then `check`: for loops that look at every batch."""
        self.add(mu, logvar)
        return self.check(None if mu_augmented is None else (mu, mu_augmented))

    def add(self, mu: Tensor, logvar: Tensor) -> None:
        """Posteriors of all ranks, (rows, Z); the oldest beyond the window leave.

        Raises ValueError for another shape.
        """
        if mu.shape != logvar.shape or mu.dim() != 2 or mu.shape[1] != self.latent_dim:
            raise ValueError(
                f"mu {tuple(mu.shape)} and logvar {tuple(logvar.shape)} must both be "
                f"(rows, {self.latent_dim})"
            )
        keep = self.config.window_rows
        self._mu = torch.cat((self._mu, mu.detach().float().cpu()))[-keep:].clone()
        self._logvar = torch.cat((self._logvar, logvar.detach().float().cpu()))[-keep:].clone()

    def check(self, views: tuple[Tensor, Tensor] | None = None) -> CollapseMetrics:
        """Compute everything over the window; counts towards `patience`."""
        rows = len(self._mu)
        number, self.checks = self.checks, self.checks + 1
        if rows < 2:
            notes = (f"{rows} rows in the window, at least 2 are needed",)
            return CollapseMetrics(0, 0.0, 0.0, 0.0, 0.0, Level.NONE, False, (), notes)
        config = self.config
        units = active_units(self._mu, config.au_variance)
        information = mutual_information(self._mu, self._logvar, seed=number)
        mean_kl = float(kl_per_dim(self._mu, self._logvar).mean())
        ratio = units / self.latent_dim
        indicators, level, notes = self._judge(ratio, information.lower, mean_kl, math.log(rows))
        self.in_a_row = self.in_a_row + 1 if level else 0
        return CollapseMetrics(
            au=units,
            au_ratio=ratio,
            mi=information.lower,
            mi_cap=information.cap,
            mean_kl=mean_kl,
            level=level,
            is_collapsing=self.in_a_row >= config.patience,
            indicators=indicators,
            notes=notes,
            infonce_bound=None if views is None else _infonce_bound(*views),
        )

    def _judge(
        self, ratio: float, mi: float, mean_kl: float, cap: float
    ) -> tuple[tuple[str, ...], Level, tuple[str, ...]]:
        config, notes = self.config, []

        def low_mi(threshold: float) -> bool:
            # Below its cap a threshold means something; above it, it would always fire.
            if threshold < cap:
                return mi < threshold
            notes.append(f"MI threshold {threshold:g} disregarded: the cap is log N = {cap:.2f}")
            return False

        missed = {
            "active units": ratio < config.min_au_ratio,
            "mutual information": low_mi(config.min_mi),
            "mean KL": mean_kl < config.min_kl,
        }
        indicators = tuple(name for name, is_missed in missed.items() if is_missed)
        level = Level(min(len(indicators), Level.MODERATE))
        if ratio < config.severe_au_ratio or low_mi(config.severe_mi):
            level = Level.SEVERE
        return indicators, level, tuple(notes)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and ints only."""
        return {
            "mu": self._mu,
            "logvar": self._logvar,
            "checks": self.checks,
            "in_a_row": self.in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly there. Raises ValueError for another latent size."""
        if state["mu"].shape[1] != self.latent_dim:
            raise ValueError(
                f"the saved window has {state['mu'].shape[1]} dimensions, this monitor "
                f"{self.latent_dim}"
            )
        self._mu, self._logvar = state["mu"].clone(), state["logvar"].clone()
        self.checks, self.in_a_row = state["checks"], state["in_a_row"]


def _infonce_bound(anchor: Tensor, positive: Tensor, temperature: float = 0.07) -> float:
    """log K - InfoNCE over K rows, nats; at most log K. van den Oord et al. 2018."""
    anchor = F.normalize(anchor.detach().float(), dim=1)
    positive = F.normalize(positive.detach().float(), dim=1)
    similarity = anchor @ positive.T / temperature
    loss = F.cross_entropy(similarity, torch.arange(len(anchor), device=anchor.device))
    return math.log(len(anchor)) - float(loss)
