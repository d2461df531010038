"""Peak memory of a variant, beyond what was in use before it ran. Figures are bytes.

CUDA: the allocator's peak less what it held at the start. CPU: the resident size of a child
process that runs this variant alone, its peak less its size after loading. The peak is read from
`VmHWM`, reset through `/proc/self/clear_refs`: `ru_maxrss` would not do, since Linux copies it
from the parent when a child is started.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from benchmarks.support.timing import Failure

REPOSITORY = Path(__file__).resolve().parents[2]
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# What marks a child's result among the other lines of its output.
RESULT_MARK = "benchmark-result: "
KILLED = -9


@dataclass(frozen=True)
class Peak:
    """The bytes that a call held. start: before the call. peak: the most during the call."""

    start: int
    peak: int

    @property
    def extra(self) -> int:
        """Compute what the call added at its peak."""
        return self.peak - self.start


def peak_of(call: Callable[[], object], device: torch.device) -> Peak:
    """Run `call` once and measure its peak.

    On a CPU the figure means something only in a process of its own: see `in_child`. Raises
    ValueError where the CPU's figure cannot be read (systems other than Linux).
    """
    gc.collect()
    # CUDA: the allocator keeps the peak.
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return Peak(start, torch.cuda.max_memory_allocated(device))
    # CPU: the kernel keeps the peak of the process.
    _return_free_memory()
    _reset_resident_peak()
    start = resident_bytes()
    call()
    return Peak(start, resident_bytes("VmHWM"))


def resident_bytes(field: str = "VmRSS") -> int:
    """Read this process's resident size, or with "VmHWM" its peak since the last reset."""
    _require_proc()
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def _reset_resident_peak() -> None:
    _require_proc()
    CLEAR_REFS.write_text("5")


def _return_free_memory() -> None:
    """Return what loading freed to the system: a call that reuses it would seem cheaper."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _require_proc() -> None:
    if not (STATUS.exists() and CLEAR_REFS.exists()):
        raise ValueError(
            f"peak memory on {sys.platform}: it is read from /proc, which only Linux has; "
            "leave the memory figures out"
        )


class ProcessesWatch:
    """Sample the memory of a process and its children inside a context.

    `peak`: the most bytes that they held at once. A page that several processes share is divided
    among them (PSS).
    """

    def __init__(self, pid: int) -> None:
        self.process, self.peak, self._done = psutil.Process(pid), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> ProcessesWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.25):
            # Children come and go: a sample during which one ended is skipped.
            try:
                processes = [self.process, *self.process.children(recursive=True)]
                held = sum(process.memory_full_info().pss for process in processes)
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
            self.peak = max(self.peak, held)


def in_child(module: str, job: dict, threads: int, timeout: float = 3600.0) -> dict | Failure:
    """Run `python -m MODULE --child JOB` in a fresh process -> what it gives to `report`.

    module: the name of the module to run.
    job: what to do; passed on as JSON.
    threads: OpenMP threads of the child.
    timeout: seconds.
    A child that fails, is killed (on a CPU the sign of too little memory) or runs longer than
    `timeout` becomes a `Failure`, with its last line.
    """
    # A fresh process starts from the same memory each time.
    command = [sys.executable, "-m", module, "--child", json.dumps(job)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    try:
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return Failure(f"not finished after {timeout:.0f} s")
    # A good child prints one line that is marked as its result.
    for line in done.stdout.splitlines():
        if done.returncode == 0 and line.startswith(RESULT_MARK):
            return json.loads(line.removeprefix(RESULT_MARK))
    # Otherwise the last line of its errors says why.
    if done.returncode == KILLED:
        return Failure("out of memory (the process was killed)", True)
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    out_of_memory = "OutOfMemoryError" in last or "can't allocate memory" in last
    return Failure(f"exit status {done.returncode}: {last}"[:300], out_of_memory)


def report(result: dict) -> None:
    """Print `result` as JSON in the child, for `in_child` to find."""
    print(RESULT_MARK + json.dumps(result), flush=True)
