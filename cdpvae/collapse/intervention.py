"""What to do about a collapse: stronger auxiliary losses, less word dropout; then back again.

Bag of words and InfoNCE pull information into z. The word dropout goes down although it is what
forces the decoder to ask z: a decoder that sees almost nothing learns nothing from z either.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cdpvae.collapse.monitor import CollapseMetrics, Level
from cdpvae.config import CollapseConfig, Settings


@dataclass(frozen=True)
class Intervention:
    """The weights from now on; also readable as `intervention["bow_weight"]`."""

    level: Level
    bow_weight: float
    contrastive_weight: float
    word_dropout: float

    def __getitem__(self, name: str) -> float:
        return asdict(self)[name]

    def __str__(self) -> str:
        """One line."""
        return (
            f"bow_weight {self.bow_weight:.2f}, contrastive_weight {self.contrastive_weight:.2f}, "
            f"word_dropout {self.word_dropout:.2f}"
        )


class AdaptiveInterventionScheduler:
    """Moves three weights by the level of each check, within bounds.

    Mild x1.1, moderate x1.3 (and dropout x0.8), severe straight to the bounds, none relaxes a
    share of the way back to the configured defaults. Nothing passes its bound or, relaxing, its
    default; a default beyond its bound is never moved, and a contrastive weight of 0 stays 0.
    """

    def __init__(
        self,
        initial_bow_weight: float,
        initial_contrastive_weight: float,
        initial_word_dropout: float,
        config: CollapseConfig,
    ) -> None:
        self.config = config
        self.default = {
            "bow_weight": float(initial_bow_weight),
            "contrastive_weight": float(initial_contrastive_weight),
            "word_dropout": float(initial_word_dropout),
        }
        self.bound = {
            "bow_weight": max(config.max_bow_weight, initial_bow_weight),
            "contrastive_weight": max(config.max_contrastive_weight, initial_contrastive_weight),
            "word_dropout": min(config.min_word_dropout, initial_word_dropout),
        }
        # What is switched off stays off.
        for name in ("bow_weight", "contrastive_weight"):
            if self.default[name] == 0:
                self.bound[name] = 0.0
        self.now = dict(self.default)

    @classmethod
    def of(cls, settings: Settings) -> AdaptiveInterventionScheduler:
        """Start from the weights and bounds of the settings."""
        loss = settings.loss
        return cls(loss.bow_weight, loss.contrastive_weight, loss.word_dropout, settings.collapse)

    @property
    def bow_weight(self) -> float:
        return self.now["bow_weight"]

    @property
    def contrastive_weight(self) -> float:
        return self.now["contrastive_weight"]

    @property
    def word_dropout(self) -> float:
        return self.now["word_dropout"]

    def intervene(self, metrics: CollapseMetrics) -> Intervention:
        """Once per check. A level that `patience` has not confirmed yet changes nothing."""
        if metrics.level == Level.NONE:
            self._relax()
        elif metrics.is_collapsing:
            self._push(metrics.level)
        return Intervention(level=metrics.level, **self.now)

    def _push(self, level: Level) -> None:
        config = self.config
        if level == Level.SEVERE:
            self.now = dict(self.bound)
            return
        factor = config.mild_factor if level == Level.MILD else config.moderate_factor
        for name in ("bow_weight", "contrastive_weight"):
            self.now[name] = min(self.now[name] * factor, self.bound[name])
        if level == Level.MODERATE:
            shrunk = self.now["word_dropout"] * config.moderate_dropout_factor
            self.now["word_dropout"] = max(shrunk, self.bound["word_dropout"])

    def _relax(self) -> None:
        rate = self.config.relaxation_rate
        for name, default in self.default.items():
            now = self.now[name]
            low, high = sorted((now, default))
            # Rounding may carry the sum past the default by its last bit.
            self.now[name] = min(max(now + (default - now) * rate, low), high)

    def state_dict(self) -> dict[str, Any]:
        return {"now": dict(self.now)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The saved weights, moved inside the bounds and defaults of now where these changed.

        Raises ValueError when the saved weights are not the three of this scheduler.
        """
        if state["now"].keys() != self.now.keys():
            raise ValueError(f"saved weights {sorted(state['now'])}, expected {sorted(self.now)}")
        for name, value in state["now"].items():
            low, high = sorted((self.default[name], self.bound[name]))
            self.now[name] = min(max(value, low), high)
