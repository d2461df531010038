"""The chart of the rows that `benchmarks/data.py` writes."""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot


def draw(path: Path) -> None:
    """Draw the last row of each measure as a PNG beside `path`.

    Three charts: seconds over records beside n log n, memory over records, records/s of each step.
    path: the CSV file with the rows.
    """
    with path.open(newline="") as file:
        last = {
            (row["part"], row["measure"], int(row["records"])): float(row["value"])
            for row in csv.DictReader(file)
        }

    def series(part: str, measure: str) -> tuple[list[int], list[float]]:
        """Return one measure over the number of records."""
        points = sorted((n, v) for (p, m, n), v in last.items() if (p, m) == (part, measure))
        return [n for n, _ in points], [v for _, v in points]

    figure, (time_axes, memory_axes, rate_axes) = pyplot.subplots(
        1, 3, figsize=(14, 4), layout="constrained"
    )
    # Seconds of the stages and of the whole command, beside n log n.
    stages = {"prepare seconds": "#1f6f8b", "deduplicate seconds": "#7d5ba6"}
    for measure, colour in {**stages, "write seconds": "#d9822b"}.items():
        time_axes.plot(*series("pipeline", measure), "o-", color=colour, label=measure[:-8])
    records, whole = series("pipeline", "whole command")
    time_axes.plot(records, whole, "o-", color="black", label="whole command")
    if records:
        guide = np.array(records) * np.log(records)
        time_axes.plot(records, whole[-1] * guide / guide[-1], ":", color="grey", label="n log n")
    # Memory, and the rates of the single steps.
    memory_axes.plot(*series("pipeline", "peak memory"), "o-", color="#1f6f8b")
    rates = {m: v for (part, m, _), v in last.items() if part in ("steps", "deduplication")}
    shown = {m: v for m, v in rates.items() if "remove" not in m and "faster" not in m}
    rate_axes.barh(list(shown)[::-1], list(shown.values())[::-1], color="#1f6f8b")
    rate_axes.set(xscale="log", title="one process, records/s")
    # Labels.
    time_axes.set(xlabel="records", title="seconds")
    memory_axes.set(xlabel="records", title="peak memory of all processes, MiB", ylim=0)
    if records:
        time_axes.set(xscale="log", yscale="log")
        time_axes.legend(frameon=False, fontsize=8)
    for axes in (time_axes, memory_axes, rate_axes):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path.with_suffix(".png"), dpi=120)
