"""The figures our kernels have to reach, and whether the newest measured rows reach them.

A figure is a quotient of two cells of `results/kernels.csv` that one run measured at one shape, or
one cell alone, held against a bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.rivals.operation import BOTH

# A row of `results/kernels.csv`: text as read from the file, numbers as just measured.
Row = Mapping[str, Any]
# What a figure may be about: `time_ms` of the rows, or a column.
TIME, MEMORY, WORKING = "time_ms", "extra_mb", "working_mb"


@dataclass(frozen=True)
class Figure:
    """One figure to reach, from the rows of the pass fwd+bwd.

    Its value is cell(over[0], column) / cell(over[1], column), or the cell of over[0] alone.

    what: the figure in words.
    device: the type of the device on which it counts.
    op: the operation.
    shape: the columns that must match, and their values.
    column: `TIME`, `MEMORY` or `WORKING`.
    over: one or two variants.
    bound: what the value is held against.
    at_most: the bound is an upper one; else a lower one.
    """

    what: str
    device: str
    op: str
    shape: Mapping[str, float]
    column: str
    over: tuple[str, ...]
    bound: float
    at_most: bool

    def value(self, rows: Sequence[Row]) -> tuple[float, str] | None:
        """Return (value, run) of the newest run that measured what the figure needs, or None."""
        # The newest run first; only cells of one run are compared.
        for run in sorted({row["run"] for row in rows}, reverse=True):
            cells = [self._cell(rows, run, variant) for variant in self.over]
            if all(cell is not None for cell in cells):
                top, *below = (cell for cell in cells if cell is not None)
                return (top / below[0] if below else top), run
        return None

    def reached(self, value: float) -> bool:
        """Return True where the value is on the right side of the bound."""
        return value <= self.bound if self.at_most else value >= self.bound

    def _cell(self, rows: Iterable[Row], run: str, variant: str) -> float | None:
        """Find the one number that a run measured for a variant at the figure's shape."""
        for row in rows:
            # The row of the figure's operation, variant, pass, device and shape that has a time.
            fits = (row["run"], row["op"], row["variant"]) == (run, self.op, variant)
            fits = fits and row["pass"] == BOTH and row["device_type"] == self.device
            if not (fits and row["status"] == "ok"):
                continue
            if all(row.get(k) and float(row[k]) == v for k, v in self.shape.items()):
                return time_ms(row) if self.column == TIME else number(row.get(self.column))
        return None


def number(cell: str | float | None) -> float | None:
    """Read a cell; an empty or missing one is None."""
    return None if cell is None or cell == "" else float(cell)


def time_ms(row: Row) -> float | None:
    """Return the time by which variants are compared: the GPU's own where taken, else wall."""
    device = number(row.get("device_ms"))
    return number(row.get("p50_ms")) if device is None else device


class _Where(NamedTuple):
    """The rows that a figure is about."""

    device: str
    op: str
    shape: Mapping[str, float]


def _recon(device: str, positions: int, hidden: int, valid: float) -> _Where:
    # The results call the number of positions "rows".
    shape = {"rows": positions, "hidden": hidden, "vocab": 128256, "valid": valid}
    return _Where(device, "linear_cross_entropy", shape)


def _bow(device: str) -> _Where:
    return _Where(device, "bow_bce", {"batch": 64, "latent": 64, "vocab": 128256})


def _figure(
    what: str,
    where: _Where,
    column: str,
    over: tuple[str, ...],
    bound: float,
    at_most: bool = True,
) -> Figure:
    return Figure(what, *where, column=column, over=over, bound=bound, at_most=at_most)


# All positions valid, and 40 % of them, on either device.
_CPU, _CPU_40 = _recon("cpu", 2048, 512, 1.0), _recon("cpu", 2048, 512, 0.4)
_GPU, _GPU_40 = _recon("cuda", 8192, 4096, 1.0), _recon("cuda", 8192, 4096, 0.4)

FIGURES = (
    # A CPU: the products bound the time, the chunk bounds the memory.
    _figure("time / two products", _CPU, TIME, ("ours", "two_gemms"), 1.2),
    _figure("eager / ours, time", _CPU, TIME, ("eager", "ours"), 1.7, False),
    _figure("torch's chunked / ours, time", _CPU, TIME, ("torch_chunked", "ours"), 4.0, False),
    _figure("eager / ours, time, 40 % valid", _CPU_40, TIME, ("eager", "ours"), 4.0, False),
    _figure("extra memory / eager's", _CPU, MEMORY, ("ours", "eager"), 0.1),
    _figure("extra memory / eager's, 40 % valid", _CPU_40, MEMORY, ("ours", "eager"), 0.1),
    _figure("description / ours, time", _bow("cpu"), TIME, ("description", "ours"), 1.4, False),
    _figure("extra memory / description's", _bow("cpu"), MEMORY, ("ours", "description"), 0.25),
    # The gradients that both return are a quarter of the description's memory by themselves.
    _figure("the same without results", _bow("cpu"), WORKING, ("ours", "description"), 0.25),
    # A GPU: the products again, and the packages that a user would take instead.
    _figure("time / two products", _GPU, TIME, ("ours", "two_gemms"), 1.15),
    _figure("Liger / ours, time", _GPU, TIME, ("liger", "ours"), 1.0, False),
    _figure("CCE / ours, time", _GPU, TIME, ("cce", "ours"), 1.0, False),
    _figure("Liger / ours, time, 40 % valid", _GPU_40, TIME, ("liger", "ours"), 2.0, False),
    _figure("extra memory [MB]", _GPU, MEMORY, ("ours",), 1200.0),
    _figure("time / copy of its bytes", _bow("cuda"), TIME, ("ours", "copy"), 2.0),
)


def report(rows: Sequence[Row]) -> str:
    """Write one line a figure: what, bound, value, reached or not, the run that measured it."""
    lines = []
    for figure in FIGURES:
        found = figure.value(rows)
        sign = "<=" if figure.at_most else ">="
        value, verdict, run = "-", "not measured", ""
        if found is not None:
            value, run = f"{found[0]:.3g}", found[1]
            verdict = "reached" if figure.reached(found[0]) else "NOT REACHED"
        lines.append(
            f"{figure.device:5}{figure.op:22}{figure.what:37}{sign} {figure.bound:<7g}"
            f"{value:>8}  {verdict:13}{run}"
        )
    return "\n".join(lines)
