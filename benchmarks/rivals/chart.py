"""A picture of rows: a panel for each operation and shape, a bar a variant, the floor a line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.rivals.figures import Row, number, time_ms

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Panels side by side.
COLUMNS = 3
# Colours.
OURS, RIVAL, FLOOR = "#1f6f5c", "#b8bfc6", "#b3402a"


def draw(
    path: Path,
    title: str,
    rows: Sequence[Row],
    floors: Mapping[str, str],
) -> None:
    """Write a PNG of `fullest_runs`; each operation's last pass is drawn.

    A bar is the median, its whisker p20 to p80, its label the time and the extra memory.

    path: where the PNG goes.
    title: above all panels.
    rows: of any operations and shapes.
    floors: by operation the variant that is its ceiling.
    Raises ValueError if no row has a time.
    """
    # Only what ran can be drawn.
    panels = _panels([row for row in rows if number(row.get("p50_ms")) is not None])
    if not panels:
        raise ValueError("no row with a time to draw")

    # Without a screen.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # A grid as tall as its longest panel needs; places without a panel stay empty.
    lines = -(-len(panels) // COLUMNS)
    bars = max(len(panel) for panel in panels.values())
    size = (5.2 * COLUMNS, lines * (1.2 + 0.27 * bars))
    figure, grid = pyplot.subplots(lines, COLUMNS, figsize=size, squeeze=False)
    for axis in grid.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, ((op, label), panel) in zip(grid.flat, panels.items(), strict=False):
        _panel(axis, f"{op}\n{label}", panel, floors[op])

    # The file, and no figure left open behind it.
    figure.suptitle(title, fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def fullest_runs(rows: Iterable[Row], device_type: str) -> list[Row]:
    """Choose for every operation and shape on a device the rows of one run.

    It is the run with the most variants, the newest of those. Only rows of one run are compared.
    """
    runs: dict[tuple[str, str, str], dict[str, list[Row]]] = {}
    for row in rows:
        if row["device_type"] == device_type:
            # Rows by what they measure, and within that by run.
            of_shape = runs.setdefault((row["op"], row["shape"], row["dtype"]), {})
            of_shape.setdefault(row["run"], []).append(row)
    return [
        row
        for of_shape in runs.values()
        for row in max(of_shape.items(), key=lambda item: (len(item[1]), item[0]))[1]
    ]


def _panels(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Sort the rows of each operation's last pass by (op, shape), in order of measurement."""
    # An operation with a backward pass is drawn with it: that is what training pays.
    last_pass = {row["op"]: row["pass"] for row in rows}
    panels: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["pass"] == last_pass[row["op"]]:
            label = f"{row['pass']}, {row['shape']}\n{row['run']}"
            panels.setdefault((row["op"], label), []).append(row)
    return panels


def _panel(
    axis: Axes,
    title: str,
    rows: Sequence[Row],
    floor: str,
) -> None:
    """Draw the bars of one operation at one shape, the slowest at the bottom.

    axis: where to draw.
    title: above the panel.
    rows: one a variant, each with a time.
    floor: the variant that is drawn as a line.
    """
    # The ceiling is a line, every other variant a bar.
    timed = [(row, time) for row in rows if (time := time_ms(row)) is not None]
    floor_ms = next((time for row, time in timed if row["variant"] == floor), None)
    bars = [(row, time) for row, time in timed if row["variant"] != floor]
    bars.sort(key=lambda bar: bar[1], reverse=True)
    names, times = [row["variant"] for row, _ in bars], [time for _, time in bars]
    colours = [OURS if name == "ours" else RIVAL for name in names]
    axis.barh(names, times, color=colours, height=0.72)

    # Whiskers are of wall time: beside a GPU's own time they would mean nothing.
    longest = max([*times, floor_ms or 0.0])
    for place, (row, time) in enumerate(bars):
        low, high = number(row["p20_ms"]), number(row["p80_ms"])
        right = time
        if number(row.get("device_ms")) is None and low is not None and high is not None:
            axis.plot([low, high], [place, place], color="black", lw=1)
            right = max(time, high)
        extra = number(row.get("extra_mb"))
        memory = "" if extra is None else f", {extra:,.0f} MB"
        axis.text(right + 0.01 * longest, place, f"{time:.3g} ms{memory}", va="center", fontsize=7)

    # Room on the right for the labels.
    if floor_ms is not None:
        axis.axvline(floor_ms, color=FLOOR, lw=1.2, ls="--")
        axis.set_xlabel(f"ms; dashed: {floor}, {floor_ms:.3g} ms", fontsize=7, color=FLOOR)
    axis.set_xlim(0, 1.35 * longest)
    axis.set_title(title, fontsize=8, loc="left")
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
