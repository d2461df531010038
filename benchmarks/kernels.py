"""Our kernels against everything a user would reach for: time, memory, share of the ceiling.

    python -m benchmarks.kernels                        # all operations at the device's full shapes
    python -m benchmarks.kernels --shapes small --ops bow_bce --variants ours eager
    python -m benchmarks.kernels --check                # figures to reach, from the newest rows

Appends a row per operation, shape, pass and variant to `results/kernels.csv`, prints them as a
table and draws `results/kernels_DEVICE.png`: of each shape the run with the most variants. The
rivals are in `benchmarks/rivals/`; one that is not installed or does not run here is a row whose
status says why.

How: the variants of an operation run interleaved, on random data; inputs smaller than the cache are
rotated. `two_gemms` and `copy` are the ceiling, measured among them: the least work of an exact
implementation and no more, on the valid rows alone. For operations of microseconds a GPU's own time
is taken too (`device_ms`, the sum of the kernels by the profiler) and used for shares and ratios,
since in a training step the host runs ahead. `extra_mb` is the peak beyond the loaded inputs, on a
CPU in a child process per variant; `working_mb` leaves out the output and the gradients, which
every variant returns. `value` is the loss, the same down a column of rivals.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import torch

from benchmarks.rivals import OPERATIONS, chart, figures
from benchmarks.rivals.contest import (
    COMPILE,
    OURS,
    Cells,
    Setting,
    measure,
    memory_in_this_process,
)
from benchmarks.support import memory, rows
from benchmarks.support.timing import release

# What a child process runs, and whose versions a row carries.
MODULE = "benchmarks.kernels"
PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy")


@dataclass
class KernelOptions:
    """What to measure. Lists are separated by spaces; empty means all."""

    ops: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    """names from the rivals' files, and "compile"; the ceiling is measured always"""
    shapes: Literal["small", "full"] = "full"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU"""
    rounds: int = 7
    threads: int = 0
    """CPU threads; 0: as torch chooses"""
    memory: bool = True
    """measure peak memory; on a CPU that starts a process per row"""
    output: str = str(rows.RESULTS)
    check: bool = False
    """only print the figures to reach, from the newest rows under OUTPUT"""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, keep and draw what the command line names.

    Raises ValueError for options that make no sense, and at the end where ours did not run.
    """
    from cdpvae.cli import parse_options

    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse_options(KernelOptions, __doc__, arguments)
    results = Path(options.output) / "kernels.csv"
    if options.check:
        print(check(results))
        return

    # Everything that a row says about where and how it was measured.
    setting = setting_of(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    conditions = rows.conditions(MODULE, arguments, setting.device, PACKAGES)
    print(", ".join(conditions.values()), flush=True)

    # Each shape's rows are kept as soon as they are there: a run may be cut off.
    found: list[Cells] = []
    for name in options.ops or OPERATIONS:
        op = OPERATIONS[name]
        for shape in op.shapes[setting.device.type, options.shapes]:
            new = measure(op, shape, setting)
            print(table(new), flush=True)
            rows.append(results, [row | conditions for row in new])
            found += new
            release(setting.device)

    # The picture is of all runs that the file holds.
    title = f"{conditions['device']}, {setting.dtype}"
    floors = {op.name: op.floor_name for op in OPERATIONS.values()}
    picture = results.with_name(f"kernels_{setting.device.type}.png")
    chart.draw(picture, title, chart.fullest_runs(rows.read(results), setting.device.type), floors)

    # A rival may fail and be a row that says why; ours may not.
    broken = [row for row in found if row["variant"] == OURS and row["status"] != "ok"]
    if broken:
        raise ValueError("ours did not run:\n" + table(broken))


def setting_of(options: KernelOptions) -> Setting:
    """Resolve what the command line leaves open.

    Raises ValueError for names that do not exist and for a device that is not there.
    """
    # Names first: a wrong one would silently measure nothing.
    variants = {name for op in OPERATIONS.values() for name in op.variants} | {COMPILE}
    for flag, asked, known in (
        ("--ops", options.ops, set(OPERATIONS)),
        ("--variants", options.variants, variants),
    ):
        wrong = sorted(set(asked) - known)
        if wrong:
            raise ValueError(f"{flag} {' '.join(wrong)}: choose from {', '.join(sorted(known))}")
    if options.rounds < 1 or options.threads < 0:
        raise ValueError(
            f"--rounds {options.rounds} --threads {options.threads}: "
            "at least 1 round; threads 0 (torch's choice) or more"
        )

    # The device that is there, and the dtype that is usual on it.
    there = torch.cuda.is_available()
    if options.device == "cuda" and not there:
        raise ValueError("--device cuda: torch finds no CUDA device; use --device cpu")
    device = options.device if options.device != "auto" else ("cuda" if there else "cpu")
    default = "bf16" if device == "cuda" else "fp32"
    return Setting(
        device=torch.device(device),
        dtype=default if options.dtype == "auto" else options.dtype,
        rounds=options.rounds,
        memory=options.memory,
        only=options.variants,
        run=datetime.now().isoformat(timespec="seconds"),
        module=MODULE,
    )


def check(results: Path) -> str:
    """Return the table of figures to reach. Raises OSError where there are no results yet."""
    return figures.report(rows.read(results))


def table(found: Sequence[Cells]) -> str:
    """Lay rows out for the terminal, a heading for each operation, pass and shape."""
    lines = []
    for row in found:
        # A new heading where operation, pass, shape or dtype changes.
        heading = f"{row['op']}, {row['pass']}, {row['shape']}, {row['dtype']}"
        if heading not in lines:
            names = "".join(f"{name:>{width}}" for name, _, width, _ in CELLS)
            lines += [heading, f"  {'variant':23}{names}  status"]
        cells = "".join(_cell(row[column], width, how) for _, column, width, how in CELLS)
        lines.append(f"  {row['variant']:23}{cells}  {row['status']}")
    return "\n".join(lines)


# Heading, column, width, format.
CELLS = (
    ("p50 ms", "p50_ms", 9, ".4g"),
    ("p20", "p20_ms", 9, ".4g"),
    ("p80", "p80_ms", 9, ".4g"),
    ("device", "device_ms", 9, ".4g"),
    ("extra MB", "extra_mb", 10, ",.1f"),
    ("TFLOP/s", "tflops", 9, ".3g"),
    ("GB/s", "gb_s", 9, ".3g"),
    ("ceiling", "share_of_ceiling", 9, ".0%"),
    ("x ours", "ratio_to_ours", 9, ".3g"),
)


def _cell(value: float | str, width: int, how: str) -> str:
    return f"{'' if value == '' else format(value, how):>{width}}"


if __name__ == "__main__":
    # The child of `contest._memory_cells`: one variant, its memory as one line of output.
    if sys.argv[1:2] == ["--child"]:
        job = json.loads(sys.argv[2])
        memory.report(memory_in_this_process(OPERATIONS[job["op"]], job))
        sys.exit(0)
    # Imported late: a child process does not need the command line of the project.
    from cdpvae.cli import run

    sys.exit(run(main))
