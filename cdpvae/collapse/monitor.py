"""Tell whether the posterior collapses, from a sliding window of codes.

The window holds codes of all ranks, so every rank sees the same and decides the same. What is
measured is the latent family's own health; this file compares it with thresholds. The random
draws of an estimator depend on the number of the check alone: a resumed run repeats them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol

import torch

from cdpvae.config import CollapseConfig
from cdpvae.latents import Code


class Level(IntEnum):
    """Severity of a collapse."""

    NONE = 0
    MILD = 1
    MODERATE = 2
    SEVERE = 3


class Family(Protocol):
    """What the monitor needs of a latent family."""

    @property
    def code_type(self) -> type[Code]:
        """The class of the family's codes."""
        ...

    def health(self, code: Code, *, seed: int, active_variance: float) -> dict[str, float]:
        """Return the figures by which the family's state is judged."""
        ...


@dataclass(frozen=True)
class CollapseMetrics:
    """One check.

    health: the family's figures, by name. For the Gaussian these are active_units and
        active_unit_ratio, mutual_information (nats) below its cap mutual_information_cap = log N,
        and mean_kl (nats per dimension).
    level: how many thresholds are missed, and how far.
    is_collapsing: the level was above NONE in `patience` checks in a row.
    indicators: the thresholds missed.
    notes: thresholds that could not be judged, and why.
    """

    level: Level
    is_collapsing: bool
    health: Mapping[str, float] = field(default_factory=dict)
    indicators: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> float:
        """Return one figure of the family's health."""
        return self.health[name]

    def __str__(self) -> str:
        """Return one line."""
        missed = ", ".join(self.indicators) or "none"
        figures = ", ".join(f"{k.replace('_', ' ')} {v:.3f}" for k, v in self.health.items())
        return f"collapse level {int(self.level)} (missed: {missed}): {figures}"


class CollapseMonitor:
    """Judge the health of a latent family over the last codes.

    family: measures. config: thresholds, window and patience.
    """

    def __init__(self, family: Family, config: CollapseConfig) -> None:
        self.family = family
        self.config = config
        self.window: Code | None = None
        self.checks = 0
        self.in_a_row = 0

    def add(self, code: Code) -> None:
        """Take codes of all ranks into the window; the oldest beyond its size leave."""
        new = code.detach().to(torch.float32, "cpu")
        both = new if self.window is None else type(new).concat([self.window, new])
        kept = both.rows(max(0, both.num_rows - self.config.window_rows))
        # The window is copied so that what has left frees its memory.
        self.window = kept.map(torch.clone)

    def check(self) -> CollapseMetrics:
        """Measure and judge the window; counts towards `patience`."""
        rows = 0 if self.window is None else self.window.num_rows
        # The number of the check seeds the draws of an estimator.
        number, self.checks = self.checks, self.checks + 1
        if self.window is None or rows < 2:
            too_few = f"{rows} rows in the window, at least 2 are needed"
            return CollapseMetrics(Level.NONE, False, notes=(too_few,))
        variance = self.config.au_variance
        health = self.family.health(self.window, seed=number, active_variance=variance)
        # A level counts once `patience` checks in a row have found one.
        indicators, level, notes = self._judge(health)
        self.in_a_row = self.in_a_row + 1 if level else 0
        return CollapseMetrics(
            level=level,
            is_collapsing=self.in_a_row >= self.config.patience,
            health=health,
            indicators=indicators,
            notes=notes,
        )

    def _judge(self, health: Mapping[str, float]) -> tuple[tuple[str, ...], Level, tuple[str, ...]]:
        """Return the thresholds missed, the level that follows, and what could not be judged.

        A figure that the family does not have misses nothing.
        """
        config = self.config
        notes: list[str] = []

        def is_below(name: str, threshold: float) -> bool:
            if name not in health:
                return False
            # Below its cap a threshold means something; above it, it would always fire.
            cap = health.get(f"{name}_cap")
            if cap is not None and threshold >= cap:
                notes.append(f"threshold {threshold:g} of {name} disregarded: the cap is {cap:.2f}")
                return False
            return health[name] < threshold

        missed = {
            "active units": is_below("active_unit_ratio", config.min_au_ratio),
            "mutual information": is_below("mutual_information", config.min_mi),
            "mean KL": is_below("mean_kl", config.min_kl),
        }
        indicators = tuple(name for name, is_missed in missed.items() if is_missed)
        level = Level(min(len(indicators), Level.MODERATE))
        if is_below("active_unit_ratio", config.severe_au_ratio) or is_below(
            "mutual_information", config.severe_mi
        ):
            level = Level.SEVERE
        return indicators, level, tuple(notes)

    def state_dict(self) -> dict[str, Any]:
        """Return the window's tensors by name, and two counters."""
        window = {} if self.window is None else self.window.tensors()
        return {**window, "checks": self.checks, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly there. Raises ValueError for the window of another family."""
        window = {key: value.clone() for key, value in state.items() if torch.is_tensor(value)}
        # A window without rows is none, whatever its tensors were called.
        if not any(len(rows) for rows in window.values()):
            window = {}
        if window and window.keys() != set(self.family.code_type.names()):
            raise ValueError(
                f"the saved window holds {sorted(window)}, which is no "
                f"{self.family.code_type.__name__} of this latent family"
            )
        self.window = self.family.code_type(**window) if window else None
        self.checks, self.in_a_row = state["checks"], state["in_a_row"]
