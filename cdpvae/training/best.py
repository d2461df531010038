"""Which evaluation of a run was the best, and for how many evaluations there has been no gain.

The rule knows figures by name only; the task says which there are and in which direction each is
better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cdpvae.config import TrainingConfig
from cdpvae.training.task import Direction


@dataclass(frozen=True)
class Rule:
    """The figure that decides. higher_is_better: else lower is."""

    name: str
    higher_is_better: bool

    @classmethod
    def of(cls, keep_best: str, directions: Mapping[str, Direction]) -> Rule:
        """Read `training.keep_best`: a name, `+name` for higher is better, `-name` for lower.

        directions: which of them is better, by name; "" where a figure alone says neither.
        Raises ValueError for an unknown figure, and for one of no direction without a sign.
        """
        name = keep_best.lstrip("+-")
        sign = keep_best[: len(keep_best) - len(name)] or directions.get(name, "")
        if name not in directions:
            raise ValueError(
                f"training.keep_best={keep_best!r}: validation has no such figure, there are "
                f"{', '.join(sorted(directions))}"
            )
        if not sign:
            raise ValueError(
                f"training.keep_best={keep_best!r}: {name} is neither better high nor low; write "
                f"'+{name}' for higher, '-{name}' for lower"
            )
        return cls(name, sign == "+")

    def __str__(self) -> str:
        """Return the name with its sign, which reads back as the same rule."""
        return ("+" if self.higher_is_better else "-") + self.name


@dataclass
class BestState:
    """What a checkpoint keeps: the best value so far under `rule`, and what came after it.

    value, step: None before the first finite value. without_gain: evaluations since.
    """

    rule: str | None = None
    value: float | None = None
    step: int | None = None
    without_gain: int = 0


class BestTracker:
    """Follow one validation figure over the evaluations of a run.

    Every rank is shown the same figures, so every rank decides alike.
    config: of the run. directions: as in `Rule.of`; not asked for without `keep_best`.
    Raises ValueError for a figure that there is not.
    """

    def __init__(self, config: TrainingConfig, directions: Mapping[str, Direction]) -> None:
        self.patience = config.stop_after_no_gain
        self.rule = Rule.of(config.keep_best, directions) if config.keep_best else None
        self.state = BestState(rule=str(self.rule) if self.rule else None)

    def see(self, step: int, figures: Mapping[str, float]) -> bool:
        """Take in the figures of a step's evaluation; return whether it is the best so far.

        An equal value and one that is not finite are no gain. Raises ValueError when the figure
        was not measured.
        """
        if self.rule is None:
            return False
        if self.rule.name not in figures:
            raise ValueError(
                f"training.keep_best={str(self.rule)!r}: this evaluation has no such figure, only "
                f"{', '.join(sorted(figures))}"
            )
        value, best = figures[self.rule.name], self.state.value
        is_gain = math.isfinite(value) and (
            best is None or (value > best if self.rule.higher_is_better else value < best)
        )
        if is_gain:
            self.state = BestState(str(self.rule), value, step)
        else:
            self.state.without_gain += 1
        return is_gain

    @property
    def is_over(self) -> bool:
        """Say whether there has been no gain for as many evaluations as the run waits."""
        return self.patience is not None and self.state.without_gain >= self.patience

    def reason(self) -> str:
        """Describe in one line why the run ends."""
        state = self.state
        best = (
            "never finite" if state.value is None else f"best {state.value:.4f}, step {state.step}"
        )
        return (
            f"stopped: no gain in {state.rule} for {state.without_gain} evaluations ({best}; "
            f"training.stop_after_no_gain={self.patience})"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return asdict(self.state)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue there; what was counted under another rule, or under none, does not count."""
        if self.rule is not None and saved.get("rule") == str(self.rule):
            self.state = BestState(**saved)
