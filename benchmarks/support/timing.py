"""Timing of variants that are compared with each other.

Variants run interleaved: every round runs each of them once, and each round starts with another
variant, so that drift (clock, cache, other load on the machine) affects all of them alike. A
figure is the median of the rounds with its 20th and 80th percentile. Times are seconds.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import quantiles

import torch


@dataclass(frozen=True)
class Timing:
    """The 20th, 50th and 80th percentile of `samples` measurements, in seconds."""

    p20: float
    p50: float
    p80: float
    samples: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Summarise measurements. Raises ValueError when there are none."""
        if not seconds:
            raise ValueError("no measurement: at least one round is needed")
        if len(seconds) == 1:
            [only] = seconds
            return cls(only, only, only, 1)
        # Deciles: the second, the fifth and the eighth.
        cuts = quantiles(seconds, n=10, method="inclusive")
        return cls(cuts[1], cuts[4], cuts[7], len(seconds))


@dataclass(frozen=True)
class Failure:
    """Why a variant has no figure, in one line; `out_of_memory` marks the common reason."""

    reason: str
    out_of_memory: bool = False

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Describe an error by its type and its first line, at most 300 characters."""
        text = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {text[0] if text else ''}".rstrip(": ")
        if is_out_of_memory(error):
            return cls(f"out of memory ({reason})"[:300], True)
        return cls(reason[:300])


def is_out_of_memory(error: BaseException) -> bool:
    """Recognise CUDA's error by its type, and the CPU allocator's by its text."""
    # A RuntimeError can be anything: only its text says that memory was short.
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def synchronize(device: torch.device) -> None:
    """Wait for everything queued on a CUDA device; nothing to do on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Free what the last variant left, so that every variant starts alike."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def seconds_of(call: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Measure the wall seconds of one call, averaged over `calls` in a row.

    The device's queue is waited for. Wall time and not device events: what the host adds to a
    step is part of its cost.
    """
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    *,
    device: torch.device,
    rounds: int,
    warmup: int = 1,
    calls: int = 1,
    between: Callable[[], object] | None = None,
) -> dict[str, Timing | Failure]:
    """Time all variants in interleaved rounds -> a `Timing`, or the `Failure` that ended it.

    variants: what to call, by name.
    device: where the variants run; its queue is waited for.
    rounds: timed rounds. Raises ValueError for fewer than one.
    warmup: untimed rounds before them.
    calls: calls in a row per measurement, for short operations.
    between: runs untimed before each measurement, say to flush the cache or clear gradients.
    A variant that raises is left out from there on and does not disturb the others.
    """
    if rounds < 1 or warmup < 0 or calls < 1:
        raise ValueError(
            f"rounds={rounds}, warmup={warmup}, calls={calls}: at least one round and one call"
        )
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    failures: dict[str, Failure] = {}
    for number in range(warmup + rounds):
        # Each round starts one variant later, so that no variant always runs first.
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            if name in failures:
                continue
            if between is not None:
                between()
            # A variant that fails leaves its memory to the others and is not called again.
            try:
                taken = seconds_of(variants[name], device, calls)
            except (RuntimeError, ValueError, NotImplementedError, MemoryError) as error:
                failures[name] = Failure.of(error)
                del error
                release(device)
                continue
            # Warm-up rounds load code and fill caches; their times are not kept.
            if number >= warmup:
                seconds[name].append(taken)
    timings = {name: Timing.of(seconds[name]) for name in names if name not in failures}
    return {name: timings.get(name) or failures[name] for name in names}
