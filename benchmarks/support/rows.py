"""Rows of results: their conditions, the CSV that keeps them, and a PNG of them.

Two rows can only be compared by their conditions, so `conditions` goes into every row: command,
commit, versions, device.
"""

from __future__ import annotations

import csv
import os
import shlex
import subprocess
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"
PACKAGES = ("torch", "transformers", "peft", "triton", "liger-kernel", "flash-attn")


def conditions(
    module: str,
    arguments: Sequence[str],
    device: torch.device,
    packages: Sequence[str] = PACKAGES,
) -> dict[str, str]:
    """Collect what a row needs to be compared with another one.

    module: with `arguments`, how to run it again: `python -m MODULE ARGUMENTS`.
    arguments: the command line after the module.
    device: where it ran.
    packages: those whose versions matter; a package that is not installed is left out.
    """
    return {
        "date": date.today().isoformat(),
        "command": f"python -m {module} {shlex.join(arguments)}".rstrip(),
        "commit": commit(),
        "versions": versions(packages),
        "device": device_name(device),
    }


def commit() -> str:
    """Find the short hash of HEAD, with "+" where tracked files differ from it."""
    git = ["git", "-C", str(REPOSITORY)]
    # A benchmark may run outside a repository, from an unpacked archive.
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return "unknown"
    # Files that git does not track do not count.
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True).returncode
    return head.stdout.strip() + ("+" if changed else "")


def versions(packages: Sequence[str]) -> str:
    """List the installed ones of `packages`, as in "torch 2.13.0, triton 3.7.1"."""
    found = []
    for name in packages:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def device_name(device: torch.device) -> str:
    """Name the GPU, or the threads of this run, the cores and the vector instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads, cores = torch.get_num_threads(), os.cpu_count()
    return f"cpu, {threads} of {cores} cores, {torch.backends.cpu.get_cpu_capability()}"


def append(path: Path, rows: Sequence[dict]) -> None:
    """Add rows to a CSV. A row stays empty in the columns that only other rows have."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # All columns in the order of their first appearance, so that old rows keep their places.
    every = [*(read(path) if path.exists() else []), *rows]
    columns = list(dict.fromkeys(name for row in every for name in row))
    # Write a new file and put it in the old one's place: a killed run loses no row.
    beside = path.with_suffix(".csv.partial")
    with beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns, restval="")
        writer.writeheader()
        writer.writerows(every)
    beside.replace(path)


def read(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV. Raises OSError where there is no file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def bars(path: Path, title: str, panels: dict[str, dict[str, tuple[float, float, float]]]) -> None:
    """Draw a PNG with one panel per measure and one bar per variant.

    panels: {"label [unit]": {variant: (low, value, high)}}; low and high draw the error bar.
    """
    # Imported here: most benchmarks of a session draw nothing.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), squeeze=False)
    # One panel per measure: each has a unit of its own.
    for axis, (label, values) in zip(axes[0], panels.items(), strict=True):
        heights = [value for _, value, _ in values.values()]
        below = [value - low for low, value, _ in values.values()]
        above = [high - value for _, value, high in values.values()]
        drawn = axis.bar(list(values), heights, yerr=[below, above], capsize=3, color="#4878a8")
        axis.bar_label(drawn, fmt="{:,.4g}", padding=2, fontsize=8)
        axis.set_ylabel(label)
        axis.margins(y=0.15)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
