"""Tell whether the posterior collapses, from a sliding window of codes.

The window holds codes of all ranks, so every rank sees the same and decides the same. What is
measured is the latent family's own health; this file compares it with thresholds. The random
draws of an estimator depend on the number of the check alone: a resumed run repeats them.

Where the use of z is watched, it comes first: a posterior may look well while the decoder ignores
z, and may look poor while the few nats it has are all used.

| use of z | indicators missed | level | moves weights |
|---|---|---|---|
| low | yes | severe | yes |
| low | no | moderate | yes |
| below twice the least | yes | mild | yes |
| more, or not judged yet | yes | mild | no |
| not low | no | none | relaxes them |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol

import torch

from cdpvae.collapse.use import Use, UseWindow
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
    is_collapsing: in `patience` checks in a row the level was above NONE and counted.
    indicators: the thresholds missed.
    notes: thresholds that could not be judged, and why.
    use: the measured use of z; None where it is not watched.
    """

    level: Level
    is_collapsing: bool
    health: Mapping[str, float] = field(default_factory=dict)
    indicators: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    use: Use | None = None

    @property
    def is_healthy(self) -> bool:
        """Whether weights may relax: nothing missed, or z used well whatever its posterior."""
        if self.level == Level.NONE:
            return True
        if self.use is None or not self.use.counts:
            return False
        return self.level == Level.MILD and not self.use.is_doubtful

    def __getitem__(self, name: str) -> float:
        """Return one figure of the family's health."""
        return self.health[name]

    def __str__(self) -> str:
        """Return one line."""
        missed = ", ".join(self.indicators) or "none"
        figures = ", ".join(f"{k.replace('_', ' ')} {v:.3f}" for k, v in self.health.items())
        use = "" if self.use is None else f"; {self.use}"
        return f"collapse level {int(self.level)} (missed: {missed}): {figures}{use}"


class CollapseMonitor:
    """Judge the health of a latent family over the last codes.

    family: measures.
    config: thresholds, window and patience.
    use: the use of z on held-out rows; None where it is not watched.
    """

    def __init__(
        self, family: Family, config: CollapseConfig, use: UseWindow | None = None
    ) -> None:
        self.family = family
        self.config = config
        self.use = use
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

    def check(self, step: int = 0) -> CollapseMetrics:
        """Measure and judge the window; counts towards `patience`.

        step: optimizer steps taken, by which the grace period of the use ends.
        """
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
        counts = level > Level.NONE
        use = None if self.use is None else self.use.judge(step)
        if use is not None:
            level, counts = _level_with_use(use, has_indicators=counts)
        self.in_a_row = self.in_a_row + 1 if counts else 0
        return CollapseMetrics(
            level=level,
            is_collapsing=counts and self.in_a_row >= self.config.patience,
            health=health,
            indicators=indicators,
            notes=notes,
            use=use,
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
        """Return the window's tensors by name, two counters, and the window of the use."""
        window = {} if self.window is None else self.window.tensors()
        use = {} if self.use is None else {"use": self.use.state_dict()}
        return {**window, "checks": self.checks, "in_a_row": self.in_a_row, **use}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly there; a state without the use of z starts its window afresh.

        Raises ValueError for the window of another family, and for a state with the use of z where
        it is not watched.
        """
        # The use has decided so far, and a continuation decides alike.
        if "use" in state and self.use is None:
            raise ValueError(
                "the saved run watched the use of z, and this one has no validation rows for it; "
                "continue with its processed_dir and with eval_rows above 0"
            )
        if self.use is not None and "use" in state:
            self.use.load_state_dict(state["use"])
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


def _level_with_use(use: Use, *, has_indicators: bool) -> tuple[Level, bool]:
    """Return the level by use and indicators together, and whether it may move weights."""
    if use.is_low:
        return (Level.SEVERE if has_indicators else Level.MODERATE), True
    if has_indicators:
        return Level.MILD, use.is_doubtful
    return Level.NONE, False
