"""One optimizer step of the real model: cdpvae beside two ways to do without it.

    python -m benchmarks.train_step                          tiny model on a CPU, shipped lengths
    python -m benchmarks.train_step --lengths pairs.json     ids and lengths of real text
    python -m benchmarks.train_step --shape 8b --micro-batch 8          8B on a GPU, random weights,
                                                 responses of 350 tokens (--mean-response)
    python -m benchmarks.train_step --double                 twice the micro-batch, same memory?
    python -m benchmarks.train_step --largest 44             largest micro-batch within 44 GiB

The variants, in one process, with the same weights and the same rows in the same micro-batches:

    ours    cdpvae's model, loss and optimizer, `steps/ours.py`
    naive   the description taken literally in stock libraries, `steps/naive.py`
    stock   what a user who knows those libraries would write, `steps/stock.py`

First all three print the same loss and gradient norms on the same micro-batch, else the exit
status is 1. Then rounds are interleaved; a measurement is `--steps` whole optimizer steps (collate,
forward, backward, clip, AdamW, schedule), half of them with the augmented view. Tokens are those
of instructions and responses without padding, soft prompts and views; MFU divides the FLOPs that
these tokens need (`cdpvae.profiling.throughput`), the same for all, by the device's peak, and is 0
where the peak is unknown. Memory is measured in a process per variant (`support/memory.py`), after
one step on one row has loaded code and made optimizer state. Phases come from a pass of their own;
ours spends the head's backward in "loss", where the gradient is computed with the loss, and naive
its head's forward in "decoder". With one process, communication is 0.

Why ours is faster at the tiny size: half of naive's positions are padding; of the others, soft
prompts need no logits; logits and their gradient are written once in chunks that fit the cache
instead of several times in memory; and naive pads its second encoder pass again.

Rows go to `results/train_step.csv`, bars to `results/train_step.png` (`train_step_cuda.png`).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.steps.naive import NaiveStep
from benchmarks.steps.ours import OurStep
from benchmarks.support import rows as results
from benchmarks.support.lengths import StepBatch
from benchmarks.support.phases import PhaseClock
from benchmarks.support.step_checks import compare
from benchmarks.support.step_memory import ask_double, ask_largest, memory_columns, peak_memory
from benchmarks.support.step_options import (
    StepOptions,
    build,
    identify,
    measured_batches,
    open_setup,
)
from benchmarks.support.step_setup import Setup
from benchmarks.support.timing import (
    Failure,
    Timing,
    interleaved,
    is_out_of_memory,
    release,
    seconds_of,
)
from cdpvae.command_line import parse_options, run
from cdpvae.profiling.throughput import mfu, peak_flops, training_flops

MODULE = "benchmarks.train_step"
# Whole logits of a full micro-batch may not fit, which must be a row and not the end of the run.
CHECKED_ROWS_ON_CUDA = 4
PHASES = ("data", "encoder", "heads", "decoder", "loss", "backward", "optimizer", "communication")


def measure(options: StepOptions) -> list[dict[str, Any]]:
    """Measure memory, loss, times and phases -> a row per variant."""
    # Memory first, while this process holds nothing.
    memory = {n: peak_memory(n, options) if options.memory else None for n in options.only}
    setup, corpus = open_setup(options)
    device = setup.device
    work = measured_batches(corpus, options)
    print(f"{options.shape}, {options.precision}, {corpus.source}; {tokens_per_row(work)}")

    # No times without the same loss and gradients.
    steps, failures = build_all(setup, options)
    few = CHECKED_ROWS_ON_CUDA if device.type == "cuda" else None
    signatures = compare(steps, work[0].micro_batches[0][:few], options.precision)

    # Times, interleaved.
    for step in steps.values():
        step.start()
    runs = {name: functools.partial(take_steps, step, work) for name, step in steps.items()}
    times = interleaved(runs, device=device, rounds=options.rounds, warmup=options.warmup)

    # A row per variant, also of those that failed. Phases come last: timing them disturbs.
    table = []
    for name in options.only:
        row = {**identify(name, options), "lengths": corpus.source, **memory_columns(memory[name])}
        if name in steps:
            row |= {"loss": round(signatures[name].loss, 6), "parts": parts(steps[name], options)}
        result = failures[name] if name in failures else times[name]
        if isinstance(result, Failure):
            row["status"] = result.reason
        else:
            row.setdefault("status", "ok")
            row |= speed_columns(result, work, setup)
            row |= phase_columns(steps[name], work, device)
        table.append(row)
    return table


def tokens_per_row(work: Sequence[StepBatch]) -> str:
    """Say how long the measured rows are: short ones measure launches, not products."""
    rows = sum(len(batch.rows) for batch in work)
    instructions = sum(batch.instruction_tokens for batch in work) / rows
    responses = sum(batch.response_tokens for batch in work) / rows
    return f"{instructions:.0f} + {responses:.0f} tokens a row"


def take_steps(step: OurStep | NaiveStep, work: Sequence[StepBatch]) -> None:
    """Take an optimizer step per step batch."""
    for batch in work:
        step.step(batch)


def build_all(
    setup: Setup, options: StepOptions
) -> tuple[dict[str, OurStep | NaiveStep], dict[str, Failure]]:
    """Build the variants by name, and say why others do not fit in memory beside them."""
    # Ours must fit; the others may be too large for what is left.
    steps: dict[str, OurStep | NaiveStep] = {}
    failures: dict[str, Failure] = {}
    for name in options.only:
        try:
            steps[name] = build(name, setup, options)
        except RuntimeError as error:
            if name == "ours" or not is_out_of_memory(error):
                raise
            failures[name] = Failure.of(error)
    return steps, failures


def parts(step: OurStep | NaiveStep, options: StepOptions) -> str:
    """Name the parts that the variant uses in this run."""
    if isinstance(step, OurStep):
        kernels = "kernels" if options.torch_device.type == "cuda" else "references"
        return f"engine {options.engine}, {kernels}, {step.model.backbone.attention.name}"
    return getattr(step, "parts", "padded, sdpa, whole logits")


def speed_columns(timing: Timing, work: Sequence[StepBatch], setup: Setup) -> dict[str, float]:
    """Compute seconds, tokens without padding and MFU per optimizer step."""
    # A measurement is all of `work`: tokens and FLOPs are added up over it.
    count = len(work)
    tokens = sum(batch.instruction_tokens + batch.response_tokens for batch in work)
    # The peak of an unknown device is not guessed.
    on_cuda = setup.device.type == "cuda"
    peak = peak_flops(torch.cuda.get_device_name(setup.device)) if on_cuda else None
    flops = sum(useful_flops(batch, setup) for batch in work)
    return {
        "step_s_p20": round(timing.p20 / count, 5),
        "step_s_p50": round(timing.p50 / count, 5),
        "step_s_p80": round(timing.p80 / count, 5),
        "tokens_per_step": round(tokens / count, 1),
        "tokens_per_second": round(tokens / timing.p50, 1),
        "tflop_per_step": round(flops / count / 1e12, 5),
        "mfu": round(mfu(flops, timing.p50, peak, world_size=1), 4),
        "rounds": timing.samples,
    }


def useful_flops(batch: StepBatch, setup: Setup) -> float:
    """Count the FLOPs that the batch's own tokens need, without padding, in any variant."""
    training, prompts = setup.settings.training, setup.settings.model.num_soft_tokens
    return training_flops(
        setup.llama,
        encoder_tokens=batch.instruction_tokens * (2 if batch.with_view else 1),
        decoder_tokens=batch.response_tokens + prompts * len(batch.rows),
        target_tokens=batch.target_tokens,
        encoder_layers=setup.llama.num_hidden_layers,
        recompute=training.gradient_checkpointing,
    )


def phase_columns(
    step: OurStep | NaiveStep, work: Sequence[StepBatch], device: torch.device
) -> dict[str, float]:
    """Measure milliseconds per optimizer step by phase; "other" is what no phase covers."""
    # The total is that of the same disturbed pass, so that the shares add up.
    clock = PhaseClock(device)
    with clock.watching(step.timed()):
        total = seconds_of(lambda: take_steps(step, work), device)
    seconds = {phase: clock.seconds.get(phase, 0.0) for phase in PHASES}
    seconds["other"] = total - sum(seconds.values())
    return {f"{name}_ms": round(1000 * value / len(work), 3) for name, value in seconds.items()}


def show(table: Sequence[dict[str, Any]]) -> None:
    """Print the rows, a line per column, with one value where all variants share it."""
    # The columns in the order of their first appearance.
    for name in dict.fromkeys(key for row in table for key in row):
        values = [str(row.get(name, "")) for row in table]
        shown = values[:1] if len(set(values)) == 1 else values
        print(f"{name:<24}" + "".join(f"{value:<40}" for value in shown).rstrip())
    # Ours beside each of the others, where both have the figure.
    speed = {row["variant"]: row.get("tokens_per_second", 0.0) for row in table}
    peaks = {row["variant"]: row.get("peak_less_loaded_mib", 0.0) for row in table}
    for name in (n for n in speed if n != "ours" and speed[n] and speed.get("ours")):
        line = f"ours against {name}: {speed['ours'] / speed[name]:.2f}x tokens per second"
        if peaks[name] and peaks["ours"]:
            line += f", {peaks['ours'] / peaks[name]:.2f}x peak memory beyond loading"
        print(line)


def draw(path: Path, table: Sequence[dict[str, Any]], title: str) -> None:
    """Draw bars of speed, with p20 to p80, and of memory."""
    panels: dict[str, dict[str, tuple[float, float, float]]] = {}
    for row in (row for row in table if "tokens_per_second" in row):
        # A slow step is a low speed: the percentiles change places.
        p50, low, high = (row[f"step_s_{p}"] for p in ("p50", "p80", "p20"))
        tokens = row["tokens_per_step"]
        panels.setdefault("non-padding tokens per second", {})[row["variant"]] = (
            tokens / low,
            tokens / p50,
            tokens / high,
        )
        if extra := row.get("peak_less_loaded_mib"):
            label = "peak memory beyond loading [MiB]"
            panels.setdefault(label, {})[row["variant"]] = (extra, extra, extra)
    if panels:
        results.bars(path, title, panels)


def benchmark(argv: Sequence[str] | None = None) -> None:
    """Parse, measure or answer a question about memory, print and save the rows.

    Raises ValueError for options that cannot be.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parse_options(StepOptions, "One optimizer step of three variants.", argv)
    options.check()
    # Either a question about memory alone, or everything.
    if options.double:
        table = ask_double(options)
    elif options.largest is not None:
        table = ask_largest(options)
    else:
        table = measure(options)
    # The conditions go into every row: without them a row cannot be compared.
    conditions = results.conditions(MODULE, argv, options.torch_device)
    show(table)
    if options.save:
        directory = Path(options.results) if options.results else results.RESULTS
        results.append(directory / "train_step.csv", [row | conditions for row in table])
        title = f"{options.shape}, {options.precision}, {conditions['device']}"
        on_cpu = options.torch_device.type == "cpu"
        picture = "train_step.png" if on_cpu else "train_step_cuda.png"
        draw(directory / picture, table, title)
    release(options.torch_device)


if __name__ == "__main__":
    sys.exit(run(benchmark))
