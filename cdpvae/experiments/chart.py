"""The picture of a sweep: rate against distortion, and against what z is worth to the decoder.

Left, NLL from z ~ q(z|x) over KL, with lines of equal -ELBO (Alemi et al. 2018, figure 1); right,
the cost of shuffled z. A point is the mean over seeds, its bars reach from the least to the most.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from cdpvae.experiments.table import FINISHED, Row

_OURS, _PUBLISHED, _LINES = "#3b6ea5", "#b03a2e", "#bbbbbb"


@dataclass(frozen=True)
class Published:
    """A row of a paper: nats per sequence."""

    name: str
    kl: float
    nll: float


@dataclass(frozen=True)
class Spread:
    """A figure over seeds."""

    mean: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise at least one value."""
        return cls(fmean(values), min(values), max(values))

    @property
    def bars(self) -> list[list[float]]:
        """Distances to the least and the most, as matplotlib takes them."""
        return [[self.mean - self.least], [self.most - self.mean]]


@dataclass(frozen=True)
class CurvePoint:
    """One choice of settings over its seeds. cost: of shuffled z, None without a latent."""

    label: str
    seeds: int
    rate: Spread
    distortion: Spread
    cost: Spread | None


def read_published(path: str) -> list[Published]:
    """Read a JSON list of {"name", "kl", "nll"}. Raises ValueError, one line."""
    try:
        content = json.loads(Path(path).read_text())
        return [Published(str(r["name"]), float(r["kl"]), float(r["nll"])) for r in content]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'--published {path}: must be a JSON list of {{"name", "kl", "nll"}}: {error!r}'
        ) from None


def curve_points(rows: Sequence[Row], varied: Sequence[str]) -> list[CurvePoint]:
    """Gather finished rows that differ in their seed only, in the order of their rates."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row["status"] == FINISHED:
            groups.setdefault(tuple(row[key] for key in varied), []).append(row)
    # A row of a model without a latent has no cost.
    points = []
    for values, members in groups.items():
        names = [key.rpartition(".")[2] for key in varied]
        costs = [float(row["cost_shuffled"]) for row in members if row["cost_shuffled"]]
        points.append(
            CurvePoint(
                label=", ".join(f"{n}={v}" for n, v in zip(names, values, strict=True)),
                seeds=len(members),
                rate=Spread.of([float(row["kl"]) for row in members]),
                distortion=Spread.of([float(row["nll_q"]) for row in members]),
                cost=Spread.of(costs) if costs else None,
            )
        )
    return sorted(points, key=lambda point: point.rate.mean)


def draw_curve(
    path: Path, rows: Sequence[Row], varied: Sequence[str], published: Sequence[Published] = ()
) -> None:
    """Draw the picture; without a finished row nothing is written.

    path: of the PNG file.
    rows: of the table.
    varied: keys of the settings that vary.
    published: rows of papers to draw in.
    """
    points = curve_points(rows, varied)
    if not points:
        return
    # A figure of its own, without pyplot's global state: rows may end in several threads.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    # Labels stand to the right of their points, and need room there.
    left.margins(x=0.12)
    right.margins(x=0.12)
    # Left, distortion over rate.
    for point in points:
        _draw_point(left, point, point.distortion)
    left.plot([p.rate.mean for p in points], [p.distortion.mean for p in points], color=_OURS)
    for row in published:
        left.plot(row.kl, row.nll, "s", color=_PUBLISHED)
        left.annotate(row.name, (row.kl, row.nll), xytext=(5, 5), textcoords="offset points")
    # What the same decoder reaches without z; several data sets give several levels.
    baselines = [float(row["baseline_nll"]) for row in rows if row.get("baseline_nll")]
    if baselines:
        level = fmean(baselines)
        left.axhline(level, color="black", linestyle=":", label=f"without z: {level:.2f}")
        left.legend(frameon=False)
    _draw_equal_elbo(left)
    left.set(xlabel="rate: KL, nats per sequence", ylabel="distortion: NLL z~q, nats per sequence")
    left.set_title("lines: equal -ELBO", fontsize="medium")
    # Right, what the decoder loses without its own z.
    used = [(point, point.cost) for point in points if point.cost is not None]
    for point, cost in used:
        _draw_point(right, point, cost)
    right.plot([p.rate.mean for p, _ in used], [c.mean for _, c in used], color=_OURS)
    right.axhline(0, color=_LINES, linewidth=0.8)
    right.set(xlabel="rate: KL, nats per sequence", ylabel="cost of shuffled z, nats per sequence")
    seeds = sorted({point.seeds for point in points})
    right.set_title(f"seeds a point: {', '.join(map(str, seeds))}", fontsize="medium")
    _save(figure, path)


def _draw_point(axes: Any, point: CurvePoint, value: Spread) -> None:
    axes.errorbar(
        [point.rate.mean],
        [value.mean],
        xerr=point.rate.bars,
        yerr=value.bars,
        fmt="o",
        color=_OURS,
        capsize=3,
    )
    place = (point.rate.mean, value.mean)
    axes.annotate(
        point.label, place, xytext=(5, -10), textcoords="offset points", fontsize="x-small"
    )


def _draw_equal_elbo(axes: Any) -> None:
    """Draw KL + NLL = constant across what is shown, and leave the limits as they are."""
    # Both axes are in nats, so that a sum of the two is a falling line.
    (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
    least, most, lines = x0 + y0, x1 + y1, 7
    for number in range(1, lines):
        total = least + (most - least) * number / lines
        axes.plot([x0, x1], [total - x0, total - x1], color=_LINES, linewidth=0.7, zorder=0)
        # The number stands where the line leaves the picture, at its left or its upper edge.
        x, y = (x0, total - x0) if total - x0 <= y1 else (total - y1, y1)
        axes.text(x, y, f"{total:.1f}", color="#888888", fontsize="x-small", va="top")
    axes.set(xlim=(x0, x1), ylim=(y0, y1))


def _save(figure: Any, path: Path) -> None:
    """Put the picture in its place whole."""
    import io

    from cdpvae.files import write_bytes

    # Whoever looks at it while a sweep runs never sees half of it.
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    write_bytes(path, content.getvalue())
