"""What a run of `benchmarks.monitor` says of the monitor: its row, and the table of all rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from cdpvae.config import Settings

COLLAPSED, HEALTHY, NEITHER = "collapsed", "healthy", "neither"
# A collapse must be caught within so many steps after the grace period.
MOST_STEPS_AFTER_GRACE = 100
Row = Mapping[str, Any]


def verdict(cost: float, kl: float) -> str:
    """Judge a run by its end: the cost of shuffled z and the KL, nats per sequence."""
    if cost < 0.5:
        return COLLAPSED
    return HEALTHY if cost > 0.5 * kl else NEITHER


@dataclass(frozen=True)
class Watch:
    """What the checks of a run saw.

    grace_steps: before them nothing is judged. first_firing: the step of the first check at which
    the monitor would intervene, None where there is none. least_use: the lowest of the judged
    checks, None where none was judged. last_use: of the last check. Uses are nats per sequence.
    """

    grace_steps: int
    first_firing: int | None
    least_use: float | None
    last_use: float

    @property
    def steps_after_grace(self) -> int | None:
        """How long after the grace period the monitor fired."""
        return None if self.first_firing is None else self.first_firing - self.grace_steps

    @classmethod
    def of(cls, checks: Sequence[Mapping[str, Any]], settings: Settings) -> Watch:
        """Read the lines of `checks.jsonl`. Raises ValueError where no use was measured."""
        if not checks or "use" not in checks[-1]:
            raise ValueError("checks.jsonl holds no use of z: the run had no check or no rows")
        steps = settings.training.max_steps
        assert steps is not None, "settings of this benchmark name their steps"
        fired = [check["step"] for check in checks if check["is_collapsing"]]
        judged = [check["use"] for check in checks if check["use_counts"]]
        return cls(
            # As in the window of the use (`cdpvae/collapse/use.py`).
            grace_steps=int(settings.collapse.grace_ratio * steps),
            first_firing=min(fired, default=None),
            least_use=min(judged, default=None),
            last_use=checks[-1]["use"],
        )


def read_checks(directory: Path) -> list[dict[str, Any]]:
    """Read `checks.jsonl` of a run, a check a line."""
    return [json.loads(line) for line in (directory / "checks.jsonl").read_text().splitlines()]


def make_row(figures: Mapping[str, float], watch: Watch) -> dict[str, Any]:
    """Return the measured columns of a row.

    figures: of `cdpvae.experiments.measure`, on validation rows.
    """
    kept = {name: round(figures[name], 3) for name in ("cost_shuffled", "cost_shuffled_se")}
    return {
        **kept,
        "kl": round(figures["kl"], 3),
        "nll_q": round(figures["nll_q"], 3),
        "verdict": verdict(figures["cost_shuffled"], figures["kl"]),
        "grace_steps": watch.grace_steps,
        "first_firing_step": _or_empty(watch.first_firing),
        "steps_after_grace": _or_empty(watch.steps_after_grace),
        "least_use": "" if watch.least_use is None else round(watch.least_use, 3),
        "last_use": round(watch.last_use, 3),
    }


def _or_empty(value: int | None) -> int | str:
    return "" if value is None else value


def summary(rows: Sequence[Row]) -> list[str]:
    """Return the table of the kinds, a line each, and what follows from it in one more line.

    rows: all of the same plan, as a CSV has them; a kind's first row decides its place.
    """
    head = ["kind", "runs", "ended", "cost", "kl", "fired", "after grace", "cost then", "higher"]
    body, caught, helped, alarms, collapsed_kinds = [], [], [], [], []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        watched = [r for r in rows if r["kind"] == kind and r["interventions"] == "off"]
        acted = {r["seed"]: r for r in rows if r["kind"] == kind and r["interventions"] == "on"}
        if not watched:
            continue
        # How it ended unwatched, and whether and when the monitor saw that.
        ends = [row["verdict"] for row in watched]
        lags = [int(r["steps_after_grace"]) for r in watched if r["steps_after_grace"] != ""]
        # With interventions, beside the same seed without them.
        pairs = [(r, acted[r["seed"]]) for r in watched if r["seed"] in acted]
        higher = sum(_cost(on) > _cost(off) for off, on in pairs)
        body.append(
            [
                kind,
                str(len(watched)),
                ", ".join(f"{ends.count(end)} {end}" for end in dict.fromkeys(ends)),
                f"{fmean(map(_cost, watched)):.2f}",
                f"{fmean(float(row['kl']) for row in watched):.2f}",
                f"{len(lags)} of {len(watched)}",
                f"at most {max(lags)}" if lags else "-",
                f"{fmean(_cost(on) for _, on in pairs):.2f}" if pairs else "-",
                f"{higher} of {len(pairs)}" if pairs else "-",
            ]
        )
        # The bars: alarms in healthy runs, collapses that are caught, and those that are helped.
        alarms += [r for r in watched if r["verdict"] == HEALTHY and r["steps_after_grace"] != ""]
        if set(ends) == {COLLAPSED}:
            collapsed_kinds.append(kind)
            if len(lags) == len(watched) and max(lags) <= MOST_STEPS_AFTER_GRACE:
                caught.append(kind)
            if pairs and higher == len(pairs):
                helped.append(kind)
    widths = [max(len(line[column]) for line in [head, *body]) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [head, *body]
    ]
    return [
        *lines,
        f"false alarms in healthy runs: {len(alarms)}; kinds whose every run collapsed: "
        f"{len(collapsed_kinds)}, caught within {MOST_STEPS_AFTER_GRACE} steps of the grace: "
        f"{len(caught)}, use higher with interventions: {len(helped)}",
    ]


def _cost(row: Row) -> float:
    return float(row["cost_shuffled"])
