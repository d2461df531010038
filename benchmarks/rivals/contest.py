"""One contest: all variants of an operation at one shape, timed against each other.

What does not run is a row whose status says why. A rate counts the least work an exact
implementation does (`Operation.work`), so a variant that does more shows a lower one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from benchmarks.rivals.figures import time_ms
from benchmarks.rivals.operation import BOTH, Operation, Shape, bytes_of
from benchmarks.support import memory
from benchmarks.support.timing import Failure, Timing, interleaved, release, seconds_of

# By the names of `--dtype`.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# A variant that every operation has beside its own, and the one that others are compared with.
COMPILE, OURS = "compile", "ours"
# More than twice the last-level cache of any device this runs on.
ROTATED_BYTES, MOST_COPIES = 256 << 20, 16
# One measurement should not be shorter; calls in a row make it longer.
MEASUREMENT_SECONDS, MOST_CALLS = 0.02, 50
# Of `results/kernels.csv`, in order; a cell that does not apply is empty.
COLUMNS = tuple(
    "run op variant pass shape rows batch tokens hidden vocab latent prompts valid dtype"
    " device_type p20_ms p50_ms p80_ms device_ms extra_mb working_mb tflops gb_s ceiling"
    " ceiling_unit share_of_ceiling ratio_to_ours value status".split()
)

# A row while it is filled in.
Cells = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What all rows of a run share.

    device: where the variants run.
    dtype: a name of `DTYPES`.
    rounds: how often each variant is timed.
    memory: whether peak memory is measured.
    only: the variants to run, empty for all.
    run: the name of the run.
    module: whose `--child` measures memory on a CPU.
    """

    device: torch.device
    dtype: str
    rounds: int
    memory: bool
    only: tuple[str, ...]
    run: str
    module: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        return DTYPES[self.dtype]


def measure(op: Operation, shape: Shape, setting: Setting) -> list[Cells]:
    """Measure one operation at one shape; returns rows with `COLUMNS`."""
    # What was compiled for another shape must not count as compiled for this one.
    torch.compiler.reset()
    inputs = copies_of_inputs(op, shape, setting)
    found: list[Cells] = []
    for of_pass in op.passes:
        found += _measure_pass(op, shape, of_pass, inputs, setting)
        release(setting.device)
    return found


def variant_names(op: Operation, setting: Setting) -> list[str]:
    """List what runs, ours first."""
    names = list(op.variants)
    return [name for name in (*names, COMPILE) if not setting.only or name in setting.only]


def function_of(op: Operation, variant: str) -> Callable[[Any], Tensor]:
    """Return the function of a variant; `COMPILE` is the eager form compiled for one shape."""
    if variant == COMPILE:
        # Compiled for this one shape, as for a loop whose shapes never change.
        return torch.compile(op.variants["eager"], dynamic=False)
    return op.variants[variant]


def copies_of_inputs(op: Operation, shape: Shape, setting: Setting) -> list[Any]:
    """Make as many different inputs as it takes to exceed the cache."""
    # Other data each time, more than the cache holds: what is read comes from memory.
    first = op.inputs(shape, setting.torch_dtype, setting.device, 0)
    copies = min(-(-ROTATED_BYTES // bytes_of(first)), MOST_COPIES)
    rest = range(1, copies)
    return [first, *(op.inputs(shape, setting.torch_dtype, setting.device, n) for n in rest)]


def rotating(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """Return a call that is the next of `calls` each time."""
    turn = cycle(calls)
    return lambda: next(turn)()


def attempt(call: Callable[[], object], device: torch.device) -> tuple[object, float] | Failure:
    """Run twice, the first time to load and compile; returns (result, seconds) or a `Failure`.

    Whatever a rival raises is its row's status; that ours has run is checked at the end.
    """
    try:
        result = call()
        return result, seconds_of(call, device)
    except Exception as error:
        return Failure.of(error)
    finally:
        release(device)


def _measure_pass(
    op: Operation,
    shape: Shape,
    of_pass: str,
    inputs: list[Any],
    setting: Setting,
) -> list[Cells]:
    """Measure all variants and the ceiling in one pass, a row each.

    op: the operation.
    shape: that of `inputs`.
    of_pass: `FORWARD` or `BOTH`.
    inputs: copies to rotate through.
    setting: what all rows share.
    """
    # Each variant as a call without arguments, the ceiling among them.
    calls = {}
    for name in variant_names(op, setting):
        run = function_of(op, name)
        calls[name] = rotating([op.call(of_pass, run, one) for one in inputs])
    calls[op.floor_name] = rotating([op.floor(one, of_pass) for one in inputs])

    # Once to see what runs at all and how long it takes, then all that runs, interleaved.
    tried = {name: attempt(call, setting.device) for name, call in calls.items()}
    ran = {name: result for name, result in tried.items() if not isinstance(result, Failure)}
    repeats = _calls_in_a_row(min(seconds for _, seconds in ran.values())) if op.short else 1
    times: Mapping[str, Timing | Failure] = interleaved(
        {name: calls[name] for name in ran},
        device=setting.device,
        rounds=setting.rounds,
        calls=repeats,
    )

    # A row for each variant, also for one that does not run.
    found: list[Cells] = []
    for name, call in calls.items():
        row: Cells = dict.fromkeys(COLUMNS, "")
        row |= _identity(op, name, shape, of_pass, setting)
        found.append(row)
        outcome = times.get(name, tried[name])
        if isinstance(outcome, Failure):
            row["status"] = outcome.reason
            continue

        # Time, the loss, and what a variant needs beyond its inputs and results.
        for percentile in ("p20", "p50", "p80"):
            row[f"{percentile}_ms"] = getattr(outcome, percentile) * 1e3
        row |= {"value": _value_of(ran[name][0]), "status": "ok"}
        if op.short and setting.device.type == "cuda":
            row["device_ms"] = _device_seconds(call, repeats) * 1e3
        if setting.memory and name != op.floor_name:
            row |= _memory_cells(op, name, shape, of_pass, call, setting)
            if row["extra_mb"] != "":
                row["working_mb"] = row["extra_mb"] - _results_mb(ran[name][0], inputs, of_pass)
    _add_rates(op, shape, of_pass, found, setting)
    return found


def _calls_in_a_row(fastest: float) -> int:
    return max(1, min(round(MEASUREMENT_SECONDS / fastest), MOST_CALLS))


def _identity(
    op: Operation,
    variant: str,
    shape: Shape,
    of_pass: str,
    setting: Setting,
) -> Cells:
    """Fill in the cells that say what a row is about."""
    text = " ".join(f"{name} {value:g}" for name, value in shape.items())
    return {
        **{"run": setting.run, "op": op.name, "variant": variant, "pass": of_pass, "shape": text},
        **shape,
        **{"dtype": setting.dtype, "device_type": setting.device.type},
    }


def _value_of(result: object) -> float | str:
    """Return a scalar loss, so that a reader sees that all rows computed the same thing."""
    if isinstance(result, Tensor) and result.dim() == 0:
        return round(result.item(), 6)
    return ""


def _results_mb(result: object, inputs: list[Any], of_pass: str) -> float:
    """Add up what every variant hands back, its output and the gradients, in MB."""
    gradients = inputs[0].wanted if of_pass == BOTH else ()
    return sum(t.nbytes for t in (result, *gradients) if isinstance(t, Tensor)) / 1e6


def _device_seconds(call: Callable[[], object], repeats: int) -> float:
    """Measure how long the GPU itself is busy in one call: its kernels, copies and fills."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    # Apart from the timing: a profiler slows the host down.
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    events = (e for e in trace.key_averages() if e.device_type == DeviceType.CUDA)
    return sum(event.self_device_time_total for event in events) * 1e-6 / repeats


def _memory_cells(
    op: Operation,
    variant: str,
    shape: Shape,
    of_pass: str,
    call: Callable[[], object],
    setting: Setting,
) -> Cells:
    """Measure the peak memory of a variant beyond its inputs: here on a GPU, else in a child.

    op, variant, shape, of_pass: what the child is to run.
    call: the same, ready to run here.
    setting: where, and in which dtype.
    """
    # A GPU's allocator counts for one process; on a CPU another variant's memory would count too.
    if setting.device.type == "cuda":
        return {"extra_mb": memory.peak_of(call, setting.device).extra / 1e6}
    # A child that runs this variant alone.
    job = {"op": op.name, "variant": variant, "pass": of_pass, "shape": dict(shape)}
    job["dtype"] = setting.dtype
    result = memory.in_child(setting.module, job, torch.get_num_threads())
    if isinstance(result, Failure):
        return {"status": f"memory: {result.reason}"}
    return {"extra_mb": result["extra"] / 1e6}


def memory_in_this_process(op: Operation, job: Mapping[str, Any]) -> dict[str, int]:
    """Do the child's side of `_memory_cells`: measure peak memory beyond the loaded inputs.

    A call at a small shape comes first, so that code and thread pools count as loaded; compiled
    code is of one shape and is made at this one.
    """
    device, dtype = torch.device("cpu"), DTYPES[job["dtype"]]
    run = function_of(op, job["variant"])
    call = op.call(job["pass"], run, op.inputs(job["shape"], dtype, device, 0))
    if job["variant"] == COMPILE:
        call()
    else:
        # Loads the code and starts the threads, with as little memory as can be.
        small = op.inputs(op.shapes["cpu", "small"][0], dtype, device, 0)
        op.call(job["pass"], run, small)()
    return {"extra": memory.peak_of(call, device).extra}


def _add_rates(
    op: Operation,
    shape: Shape,
    of_pass: str,
    found: list[Cells],
    setting: Setting,
) -> None:
    """Put rates, share of the ceiling and ratio to ours into the rows that have a time."""
    # Everything is compared by the same time: the GPU's own where it was taken.
    work = op.work(shape, of_pass, setting.torch_dtype.itemsize)
    times = {row["variant"]: time_ms(row) for row in found}
    floor, ours = times[op.floor_name], times.get(OURS)
    for row in found:
        own = times[row["variant"]]
        if own is None:
            continue
        # Every variant is charged the least work, so one that does more shows a lower rate.
        if work.flops:
            row["tflops"] = work.flops / own * 1e-9
        row["gb_s"] = work.bytes / own * 1e-6
        if floor is not None:
            row["ceiling"] = (work.bytes * 1e-6 if op.short else work.flops * 1e-9) / floor
            row["ceiling_unit"] = "GB/s" if op.short else "TFLOP/s"
            row["share_of_ceiling"] = floor / own
        if ours is not None:
            row["ratio_to_ours"] = own / ours
