"""One optimizer step of the real model: cdpvae against two ways of doing without it.

    python -m benchmarks.train_step                          tiny model on a CPU, shipped lengths
    python -m benchmarks.train_step --lengths pairs.json     ids and lengths of real text
    python -m benchmarks.train_step --shape 8b --micro-batch 8          8B on a GPU, random weights
    python -m benchmarks.train_step --double                 twice the micro-batch, same memory?
    python -m benchmarks.train_step --largest 44             largest micro-batch within 44 GiB

The variants, in one process, with the same weights and the same rows in the same micro-batches:

    ours    cdpvae's model, loss and optimizer, as `support/our_step.py` puts them together
    naive   the description taken literally in stock libraries, `naive_step.py`
    stock   what a user who knows those libraries would write, `stock_step.py`

First all three print the same loss and gradient norms on the same micro-batch, else the exit
status is 1. Then rounds are interleaved; a measurement is `--steps` whole optimizer steps (collate,
forward, backward, clip, AdamW, schedule), half of them with the augmented view. Tokens are those
of instructions and responses without padding, soft prompts and views; MFU divides the FLOPs that
these tokens need (`cdpvae.profiling.throughput`), the same for all, by the device's peak, and is 0
where that is unknown. Memory is measured in a process per variant (`support/memory.py`), after one
step on one row has loaded code and made optimizer state. Phases come from a pass of their own;
ours spends the head's backward in "loss", where the gradient is computed with the loss, and naive
its head's forward in "decoder". One process: communication is 0.

What makes the difference at the tiny size: half of naive's positions are padding; of those that
are not, soft prompts need no logits; logits and their gradient are written once in chunks that fit
the cache instead of several times in memory; and the second encoder pass pads on its own.

Rows go to `results/train_step.csv`, bars to `results/train_step.png` (`train_step_cuda.png`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.steps.naive import NaiveStep
from benchmarks.steps.ours import OurStep
from benchmarks.support import rows as results
from benchmarks.support.lengths import Window
from benchmarks.support.phases import PhaseClock
from benchmarks.support.step_checks import compare
from benchmarks.support.step_memory import ask_double, ask_largest, memory_columns, peak_memory
from benchmarks.support.step_options import StepOptions, build, head, open_setup, some_windows
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
# Whole logits of a full micro-batch may not fit, which the benchmark is to say and not to die of.
CHECKED_ROWS_ON_CUDA = 4
PHASES = ("data", "encoder", "heads", "decoder", "loss", "backward", "optimizer", "communication")


def measure(options: StepOptions) -> list[dict]:
    """Memory first, while this process holds nothing; then loss, times and phases."""
    memory = {n: peak_memory(n, options) if options.memory else None for n in options.only}
    setup, corpus = open_setup(options)
    device = setup.device
    print(f"{options.shape}, {options.precision}, {corpus.source}")
    steps, failures = build_all(setup, options)
    work = some_windows(corpus, options)
    few = CHECKED_ROWS_ON_CUDA if device.type == "cuda" else None
    signatures = compare(steps, work[0].micro_batches[0][:few], options.precision)
    for step in steps.values():
        step.start()
    runs = {name: lambda s=s: [s.step(window) for window in work] for name, s in steps.items()}
    times = interleaved(runs, device=device, rounds=options.rounds, warmup=options.warmup)
    table = []
    for name in options.only:
        row = {**head(name, options), "lengths": corpus.source, **memory_columns(memory[name])}
        if name in steps:
            row |= {"loss": round(signatures[name].loss, 6), "parts": parts(steps[name], options)}
        if failure := failures.get(name) or failure_of(times[name]):
            row["status"] = failure.reason
        else:
            row.setdefault("status", "ok")
            row |= speed_columns(times[name], work, setup)
            row |= phase_columns(steps[name], work, device)
        table.append(row)
    return table


def build_all(setup: Setup, options: StepOptions) -> tuple[dict, dict[str, Failure]]:
    """The variants by name, and why others have no room beside them."""
    steps, failures = {}, {}
    for name in options.only:
        try:
            steps[name] = build(name, setup, options)
        except RuntimeError as error:
            if name == "ours" or not is_out_of_memory(error):
                raise
            failures[name] = Failure.of(error)
    return steps, failures


def failure_of(result: Timing | Failure) -> Failure | None:
    return result if isinstance(result, Failure) else None


def parts(step: OurStep | NaiveStep, options: StepOptions) -> str:
    """What the variant is made of in this run."""
    if step.name == "ours":
        kernels = "kernels" if options.device.startswith("cuda") else "references"
        return f"engine {options.engine}, {kernels}, {step.model.backbone.attention.name}"
    return getattr(step, "parts", "padded, sdpa, whole logits")


def speed_columns(timing: Timing, work: list[Window], setup: Setup) -> dict:
    """Per optimizer step: seconds, tokens without padding, and MFU."""
    count = len(work)
    tokens = sum(window.instruction_tokens + window.response_tokens for window in work)
    on_cuda = setup.device.type == "cuda"
    peak = peak_flops(torch.cuda.get_device_name(setup.device)) if on_cuda else None
    flops = sum(useful_flops(window, setup) for window in work)
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


def useful_flops(window: Window, setup: Setup) -> float:
    """What the window's own tokens need, without padding, whoever computes them."""
    training, prompts = setup.settings.training, setup.settings.model.num_soft_tokens
    return training_flops(
        setup.llama,
        encoder_tokens=window.instruction_tokens * (2 if window.with_view else 1),
        decoder_tokens=window.response_tokens + prompts * len(window.rows),
        target_tokens=window.target_tokens,
        encoder_layers=setup.llama.num_hidden_layers,
        recompute=training.gradient_checkpointing,
    )


def phase_columns(step: OurStep | NaiveStep, work: list[Window], device: torch.device) -> dict:
    """Milliseconds per optimizer step by phase; "other" is what no phase covers."""
    clock = PhaseClock(device)
    with clock.watching(step.timed()):
        total = seconds_of(lambda: [step.step(window) for window in work], device)
    seconds = {phase: clock.seconds.get(phase, 0.0) for phase in PHASES}
    seconds["other"] = total - sum(seconds.values())
    return {f"{name}_ms": round(1000 * value / len(work), 3) for name, value in seconds.items()}


def show(table: list[dict]) -> None:
    """The rows as text: one line per column, a value once where all variants share it."""
    for name in dict.fromkeys(key for row in table for key in row):
        values = [str(row.get(name, "")) for row in table]
        shown = values[:1] if len(set(values)) == 1 else values
        print(f"{name:<24}" + "".join(f"{value:<40}" for value in shown).rstrip())
    speed = {row["variant"]: row.get("tokens_per_second") for row in table}
    peaks = {row["variant"]: row.get("peak_less_loaded_mib") for row in table}
    for name in (n for n in speed if n != "ours" and speed.get(n) and speed.get("ours")):
        line = f"ours against {name}: {speed['ours'] / speed[name]:.2f}x tokens per second"
        if peaks[name] and peaks["ours"]:
            line += f", {peaks['ours'] / peaks[name]:.2f}x peak memory beyond loading"
        print(line)


def draw(path: Path, table: list[dict], title: str) -> None:
    """Bars of speed, with p20 to p80, and of memory."""
    panels: dict[str, dict[str, tuple[float, float, float]]] = {}
    for row in (row for row in table if "tokens_per_second" in row):
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
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parse_options(StepOptions, "One optimizer step against its rivals.", argv)
    options.check()
    if options.double:
        table = ask_double(options)
    elif options.largest is not None:
        table = ask_largest(options)
    else:
        table = measure(options)
    conditions = results.conditions(MODULE, argv, torch.device(options.device))
    show(table)
    if options.save:
        directory = Path(options.results) if options.results else results.RESULTS
        results.append(directory / "train_step.csv", [row | conditions for row in table])
        title = f"{options.shape}, {options.precision}, {conditions['device']}"
        picture = "train_step.png" if options.device == "cpu" else "train_step_cuda.png"
        draw(directory / picture, table, title)
    release(torch.device(options.device))


if __name__ == "__main__":
    sys.exit(run(benchmark))
