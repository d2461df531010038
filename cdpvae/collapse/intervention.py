"""Answer a collapse with stronger auxiliary losses and less word dropout; then relax again.

Bag of words and InfoNCE pull information into z. The word dropout goes down although it is what
forces the decoder to use z: a decoder that sees almost nothing learns nothing from z either.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cdpvae.collapse.monitor import CollapseMetrics, Level
from cdpvae.config import CollapseConfig, Settings


@dataclass(frozen=True)
class Intervention:
    """The weights that apply from the next step on.

    Also readable as `intervention["bow_weight"]`.
    """

    level: Level
    bow_weight: float
    contrastive_weight: float
    word_dropout: float

    def __getitem__(self, name: str) -> float:
        return asdict(self)[name]

    def __str__(self) -> str:
        """Write the weights in one line."""
        return (
            f"bow_weight {self.bow_weight:.2f}, contrastive_weight {self.contrastive_weight:.2f}, "
            f"word_dropout {self.word_dropout:.2f}"
        )


class AdaptiveInterventionScheduler:
    """Move three weights by the level of each check, within bounds.

    A mild collapse multiplies the two loss weights by `mild_factor` (1.1), a moderate one by
    `moderate_factor` (1.3), and the word dropout by `moderate_dropout_factor` (0.8); a severe one
    sets all three to their bounds. A healthy check relaxes them by `relaxation_rate` of
    the way back to their defaults. No weight passes its bound or, relaxing, its default; a default
    beyond its bound is never moved, and a loss weight of 0 stays 0.

    initial_bow_weight: default of the bag-of-words weight.
    initial_contrastive_weight: default of the weight of InfoNCE.
    initial_word_dropout: default of the share of decoder inputs dropped.
    config: bounds, factors and the rate.
    """

    def __init__(
        self,
        initial_bow_weight: float,
        initial_contrastive_weight: float,
        initial_word_dropout: float,
        config: CollapseConfig,
    ) -> None:
        # Remember where relaxing ends.
        self.config = config
        self.default = {
            "bow_weight": float(initial_bow_weight),
            "contrastive_weight": float(initial_contrastive_weight),
            "word_dropout": float(initial_word_dropout),
        }
        # Set how far an intervention may go.
        self.bound = {
            "bow_weight": max(config.max_bow_weight, initial_bow_weight),
            "contrastive_weight": max(config.max_contrastive_weight, initial_contrastive_weight),
            "word_dropout": min(config.min_word_dropout, initial_word_dropout),
        }
        # A loss that is switched off stays off.
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
        """The weight of the bag-of-words loss that applies from the next step on."""
        return self.now["bow_weight"]

    @property
    def contrastive_weight(self) -> float:
        """The weight of InfoNCE that applies from the next step on."""
        return self.now["contrastive_weight"]

    @property
    def word_dropout(self) -> float:
        """The share of decoder inputs dropped that applies from the next step on."""
        return self.now["word_dropout"]

    def intervene(self, metrics: CollapseMetrics) -> Intervention:
        """Move the weights once, after a check.

        A level that does not count, or that `patience` has not confirmed yet, changes nothing.
        """
        if metrics.is_healthy:
            self._relax()
        elif metrics.is_collapsing:
            self._push(metrics.level)
        return Intervention(level=metrics.level, **self.now)

    def _push(self, level: Level) -> None:
        """Move the weights towards their bounds."""
        # A severe collapse leaves no time for small steps.
        config = self.config
        if level == Level.SEVERE:
            self.now = dict(self.bound)
            return
        # Milder levels move by a factor, so that a level that stays goes on pushing.
        factor = config.mild_factor if level == Level.MILD else config.moderate_factor
        for name in ("bow_weight", "contrastive_weight"):
            self.now[name] = min(self.now[name] * factor, self.bound[name])
        if level == Level.MODERATE:
            shrunk = self.now["word_dropout"] * config.moderate_dropout_factor
            self.now["word_dropout"] = max(shrunk, self.bound["word_dropout"])

    def _relax(self) -> None:
        """Move the weights towards their defaults."""
        rate = self.config.relaxation_rate
        for name, default in self.default.items():
            now = self.now[name]
            low, high = sorted((now, default))
            # Rounding may carry the sum past the default by its last bit.
            self.now[name] = min(max(now + (default - now) * rate, low), high)

    def state_dict(self) -> dict[str, Any]:
        """Save the three weights of now."""
        return {"now": dict(self.now)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with saved weights, moved inside the bounds and defaults where these changed.

        Raises ValueError when the saved weights are not the three of this scheduler.
        """
        if state["now"].keys() != self.now.keys():
            raise ValueError(f"saved weights {sorted(state['now'])}, expected {sorted(self.now)}")
        for name, value in state["now"].items():
            low, high = sorted((self.default[name], self.bound[name]))
            self.now[name] = min(max(value, low), high)
