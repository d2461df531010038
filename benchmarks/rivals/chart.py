"""A picture of rows: a panel for each operation and shape, a bar a variant, the floor a line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.rivals.figures import number, time_ms

COLUMNS = 3
OURS, RIVAL, FLOOR = "#1f6f5c", "#b8bfc6", "#b3402a"


def draw(path: Path, title: str, rows: Sequence[Mapping], floors: Mapping[str, str]) -> None:
    """Write a PNG of `fullest_runs`; each operation's last pass is drawn. floors: op -> variant.

    A bar is the median, its whisker p20 to p80, its label the time and the extra memory. Raises
    ValueError if no row has a time.
    """
    panels = _panels([row for row in rows if number(row.get("p50_ms")) is not None])
    if not panels:
        raise ValueError("no row with a time to draw")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = -(-len(panels) // COLUMNS)
    bars = max(len(panel) for panel in panels.values())
    size = (5.2 * COLUMNS, lines * (1.2 + 0.27 * bars))
    figure, grid = pyplot.subplots(lines, COLUMNS, figsize=size, squeeze=False)
    for axis in grid.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, ((op, label), panel) in zip(grid.flat, panels.items(), strict=False):
        _panel(axis, f"{op}\n{label}", panel, floors[op])
    figure.suptitle(title, fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def fullest_runs(rows: Iterable[Mapping], device_type: str) -> list[Mapping]:
    """Of every operation and shape on a device the rows of one run: that with the most variants,
    the newest of those. Only rows of one run are compared.
    """
    runs: dict[tuple[str, str, str], dict[str, list[Mapping]]] = {}
    for row in rows:
        if row["device_type"] == device_type:
            of_shape = runs.setdefault((row["op"], row["shape"], row["dtype"]), {})
            of_shape.setdefault(row["run"], []).append(row)
    return [
        row
        for of_shape in runs.values()
        for row in max(of_shape.items(), key=lambda item: (len(item[1]), item[0]))[1]
    ]


def _panels(rows: Sequence[Mapping]) -> dict[tuple[str, str], list[Mapping]]:
    """(op, shape) -> its rows of the op's last pass, in order of measurement."""
    last_pass = {row["op"]: row["pass"] for row in rows}
    panels: dict[tuple[str, str], list[Mapping]] = {}
    for row in rows:
        if row["pass"] == last_pass[row["op"]]:
            label = f"{row['pass']}, {row['shape']}\n{row['run']}"
            panels.setdefault((row["op"], label), []).append(row)
    return panels


def _panel(axis, title: str, rows: Sequence[Mapping], floor: str) -> None:
    floor_ms = next((time_ms(row) for row in rows if row["variant"] == floor), None)
    bars = sorted((row for row in rows if row["variant"] != floor), key=time_ms, reverse=True)
    times = [time_ms(row) for row in bars]
    colours = [OURS if row["variant"] == "ours" else RIVAL for row in bars]
    axis.barh([row["variant"] for row in bars], times, color=colours, height=0.72)
    longest = max([*times, floor_ms or 0.0])
    for place, (row, time) in enumerate(zip(bars, times, strict=True)):
        low, high = number(row["p20_ms"]), number(row["p80_ms"])
        if number(row.get("device_ms")) is None:
            axis.plot([low, high], [place, place], color="black", lw=1)
        extra = number(row.get("extra_mb"))
        memory = "" if extra is None else f", {extra:,.0f} MB"
        right = max(time, high if number(row.get("device_ms")) is None else 0.0)
        axis.text(right + 0.01 * longest, place, f"{time:.3g} ms{memory}", va="center", fontsize=7)
    if floor_ms is not None:
        axis.axvline(floor_ms, color=FLOOR, lw=1.2, ls="--")
        axis.set_xlabel(f"ms; dashed: {floor}, {floor_ms:.3g} ms", fontsize=7, color=FLOOR)
    axis.set_xlim(0, 1.35 * longest)
    axis.set_title(title, fontsize=8, loc="left")
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
