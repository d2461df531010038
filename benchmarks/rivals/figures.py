"""The figures our kernels have to reach, and whether the newest measured rows reach them.

A figure is a quotient of two cells of `results/kernels.csv` that one run measured at one shape, or
one cell alone, held against a bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.rivals.operation import BOTH

Row = Mapping[str, str]
TIME, MEMORY, WORKING = "time_ms", "extra_mb", "working_mb"


@dataclass(frozen=True)
class Figure:
    """value = cell(over[0], column) / cell(over[1], column), or the cell alone, pass fwd+bwd.

    shape: the columns that must match. at_most: the bound is an upper one.
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
        """(value, run) of the newest run that measured all it needs, or None."""
        for run in sorted({row["run"] for row in rows}, reverse=True):
            cells = [self._cell(rows, run, variant) for variant in self.over]
            if all(cell is not None for cell in cells):
                top, *below = (cell for cell in cells if cell is not None)
                return (top / below[0] if below else top), run
        return None

    def reached(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound

    def _cell(self, rows: Iterable[Row], run: str, variant: str) -> float | None:
        for row in rows:
            fits = (row["run"], row["op"], row["variant"]) == (run, self.op, variant)
            fits = fits and row["pass"] == BOTH and row["device_type"] == self.device
            if not (fits and row["status"] == "ok"):
                continue
            if all(row.get(k) and float(row[k]) == v for k, v in self.shape.items()):
                return time_ms(row) if self.column == TIME else number(row.get(self.column))
        return None


def number(cell: str | float | None) -> float | None:
    return None if cell in ("", None) else float(cell)


def time_ms(row: Mapping) -> float | None:
    """The time by which variants are compared: the GPU's own where it was taken, else wall."""
    device = number(row.get("device_ms"))
    return number(row.get("p50_ms")) if device is None else device


def _recon(device: str, rows: int, hidden: int, valid: float) -> dict:
    shape = {"rows": rows, "hidden": hidden, "vocab": 128256, "valid": valid}
    return {"device": device, "op": "linear_cross_entropy", "shape": shape}


def _bow(device: str) -> dict:
    shape = {"batch": 64, "latent": 64, "vocab": 128256}
    return {"device": device, "op": "bow_bce", "shape": shape}


def _figure(what: str, where: dict, column: str, over: tuple[str, ...], bound: float, at_most=True):
    return Figure(what, column=column, over=over, bound=bound, at_most=at_most, **where)


_CPU, _CPU_40 = _recon("cpu", 2048, 512, 1.0), _recon("cpu", 2048, 512, 0.4)
_GPU, _GPU_40 = _recon("cuda", 8192, 4096, 1.0), _recon("cuda", 8192, 4096, 0.4)

FIGURES = (
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
    _figure("time / two products", _GPU, TIME, ("ours", "two_gemms"), 1.15),
    _figure("Liger / ours, time", _GPU, TIME, ("liger", "ours"), 1.0, False),
    _figure("CCE / ours, time", _GPU, TIME, ("cce", "ours"), 1.0, False),
    _figure("Liger / ours, time, 40 % valid", _GPU_40, TIME, ("liger", "ours"), 2.0, False),
    _figure("extra memory [MB]", _GPU, MEMORY, ("ours",), 1200.0),
    _figure("time / copy of its bytes", _bow("cuda"), TIME, ("ours", "copy"), 2.0),
)


def report(rows: Sequence[Row]) -> str:
    """One line a figure: what, bound, value, reached or not, the run it is from."""
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
