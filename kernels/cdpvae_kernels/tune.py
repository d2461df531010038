"""Measure block sizes and warps on this machine's GPU and keep the best ones for it.

    python -m cdpvae_kernels.tune [--only linear_cross_entropy ...] [--minutes M] [--rounds 20]
        [--dry-run]

Every kernel runs with every candidate, interleaved, so that a GPU that changes its clock does so
for all of them; the median counts. A candidate must beat the present choice by 2 % to replace it.
Kernels that move most bytes come first, and each is written as soon as it is known. With
`--minutes` each kernel gets its part of what is left, candidates beyond it are not tried.
The result goes to $CDPVAE_KERNELS_CONFIGS or ~/.cache/cdpvae_kernels/launch_configs.json under the
GPU's name and counts for this GPU alone. Other block sizes add in another order: results before
and after differ in their last bits.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from cdpvae_kernels.common.launch_configs import (
    LaunchConfig,
    Table,
    launch_config,
    read_table,
    user_table_path,
)
from cdpvae_kernels.common.tuning import Shapes, Tunable, tuning_modules

# Less is noise, and a change of block sizes changes the last bits of results.
LEAST_GAIN = 0.02
# By the names of `--dtype`.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# One to two milliseconds of a GPU: ten times what the host needs for a launch.
BUSY_CYCLES = 2_000_000

# Milliseconds that one call takes.
Clock = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Choice:
    """What was found for one kernel.

    config: its name in `launch_configs.json`.
    before: the configuration that counted so far.
    before_ms: its median.
    best: the configuration to take from now on.
    best_ms: its median.
    bytes: read and written by one launch.
    failed: how many candidates do not run, or could not.
    untried: how many the time did not suffice for.
    """

    config: str
    before: LaunchConfig
    before_ms: float
    best: LaunchConfig
    best_ms: float
    bytes: int
    failed: int
    untried: int = 0

    @property
    def gigabytes_per_second(self) -> float:
        """The rate of the best configuration."""
        return self.bytes / self.best_ms / 1e6

    def line(self) -> str:
        """Put the choice in one line for the terminal."""
        shown = " ".join(f"{key}={value}" for key, value in self.best.items())
        change = "kept" if self.best == self.before else f"was {self.before_ms:.4f}"
        return (
            f"{self.config:32s} {self.best_ms:8.4f} ms ({change})  "
            f"{self.gigabytes_per_second:7.1f} GB/s  {shown}"
            + (f"  ({self.failed} candidates do not run)" if self.failed else "")
            + (f"  ({self.untried} not tried)" if self.untried else "")
        )


def tune(
    tunable: Tunable,
    device: torch.device,
    rounds: int,
    clock: Clock,
    seconds: float = math.inf,
) -> Choice:
    """Time every candidate of one kernel and choose the fastest.

    tunable: the kernel, with its candidates.
    device: where it runs; its present configuration is the first candidate.
    rounds: how often each candidate is timed.
    clock: times one launch.
    seconds: after half of them no candidate is compiled, after all of them none is timed again.
    Raises RuntimeError when the present configuration does not run.
    """
    # All combinations of candidates, the present one first, without those that cannot run.
    started = time.monotonic()
    before = launch_config(tunable.config, device)
    names = list(tunable.candidates)
    grid = [
        dict(zip(names, values, strict=True))
        for values in itertools.product(*tunable.candidates.values())
    ]
    # In another order than that of the grid, so that time which ends leaves out some of everywhere.
    random.Random(0).shuffle(grid)
    if not _runs(tunable, before):
        raise RuntimeError(f"{tunable.config}: its present configuration {before} does not run")
    running, failed, untried = [before], 0, 0
    limit = _shared_limit(device)
    for config in grid:
        if config == before:
            continue
        if time.monotonic() - started > seconds / 2:
            untried += 1
        elif tunable.fits(config, limit) and _runs(tunable, config):
            running.append(config)
        else:
            failed += 1

    # Interleaved rounds: a drift of the GPU's clock hits all candidates alike.
    times: list[list[float]] = [[] for _ in running]
    for done in range(rounds):
        if done and time.monotonic() - started > seconds:
            break
        for config, measured in zip(running, times, strict=True):
            measured.append(clock(partial(tunable.launch, config)))

    # The fastest median, if its gain is more than noise.
    medians = [statistics.median(measured) for measured in times]
    best = min(range(len(running)), key=medians.__getitem__)
    if medians[best] > (1.0 - LEAST_GAIN) * medians[0]:
        best = 0
    return Choice(
        tunable.config,
        before,
        medians[0],
        running[best],
        medians[best],
        tunable.bytes,
        failed,
        untried,
    )


def _shared_limit(device: torch.device) -> float:
    """Return the bytes of shared memory that a block may have; without a GPU any number."""
    if device.type != "cuda":
        return math.inf
    # torch's stub does not have this attribute.
    limit: int = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin")  # noqa: B009
    return limit


def _runs(tunable: Tunable, config: LaunchConfig) -> bool:
    """Compile and run once; returns False where the compiler or the GPU cannot."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    # A pass of the compiler that fails raises RuntimeError. A GPU that is broken by a launch raises
    # it too, and again when the present configuration is timed.
    try:
        tunable.launch(config)
    except (OutOfResources, PTXASError, CompilationError, RuntimeError):
        return False
    return True


def cuda_clock(call: Callable[[], object]) -> float:
    """Time the GPU's part of one call between two events.

    The GPU is kept busy while the host makes its launches, which takes longer than many a kernel:
    else the time between the events would be the host's.
    """
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(BUSY_CYCLES)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def wall_clock(call: Callable[[], object]) -> float:
    """Time one call of the interpreter, where there is no device to wait for."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def write(choices: Sequence[Choice], device_name: str, path: Path) -> None:
    """Merge choices into the user's table: other GPUs and other kernels keep their entries."""
    table: Table = json.loads(path.read_text()) if path.exists() else {}
    table[device_name] = table.get(device_name, {}) | {c.config: c.best for c in choices}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(table, indent=2) + "\n")
    # Replaced at once: a run that starts meanwhile reads the old table or the new one.
    os.replace(partial, path)
    read_table.cache_clear()


def find_tunables(shapes: Shapes, device: torch.device, only: Sequence[str]) -> list[Tunable]:
    """Find the kernels whose name starts with one of `only`; all of them if it is empty.

    Those that move most bytes come first. Raises ValueError where no name matches.
    """
    found = [t for module in tuning_modules() for t in module.tunables(shapes, device)]
    chosen = [t for t in found if not only or any(t.config.startswith(name) for name in only)]
    if not chosen:
        known = ", ".join(sorted({t.config for t in found}))
        raise ValueError(f"--only {' '.join(only)}: no such kernel; known are {known}")
    return sorted(chosen, key=lambda tunable: -tunable.bytes)


def main(argv: Sequence[str] | None = None) -> int:
    """Tune the kernels that the command line names, print and keep the choices."""
    # What to tune, and on what data.
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=(), help="kernels, by the start of the name")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=math.inf, help="for all kernels together")
    parser.add_argument("--dry-run", action="store_true", help="measure and print, write nothing")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    for name in ("vocab", "width", "latent", "rows", "chunk", "tokens", "prompts"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Shapes(), name))
    options = vars(parser.parse_args(argv))
    only, rounds, dry_run, minutes = (
        options.pop(name) for name in ("only", "rounds", "dry_run", "minutes")
    )
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU to measure on")
    device = torch.device("cuda", torch.cuda.current_device())
    shapes = Shapes(**{**options, "dtype": DTYPES[options["dtype"]]})

    try:
        tunables = find_tunables(shapes, device, only)
    except ValueError as error:
        parser.error(str(error))

    # One kernel after the other, each printed and written as soon as it is known: what ends the run
    # takes nothing away. The table counts from the next launch on.
    name, path = torch.cuda.get_device_name(device), user_table_path()
    end = time.monotonic() + 60 * minutes
    for left, tunable in zip(range(len(tunables), 0, -1), tunables, strict=True):
        choice = tune(tunable, device, rounds, cuda_clock, (end - time.monotonic()) / left)
        print(choice.line(), flush=True)
        if not dry_run:
            write([choice], name, path)
    if not dry_run:
        print(f"written to {path} for {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
