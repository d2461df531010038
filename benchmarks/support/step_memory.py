"""Peak memory of one variant of the training step, in a process of its own; and what it allows.

`peak_memory` starts `python -m benchmarks.support.step_memory --child JOB`. The process loads the
variant, takes a step on one row with and one without the view, so that code is loaded and the
optimizer has its state, and then runs the windows of the benchmark.
"""

from __future__ import annotations

import dataclasses
import json
import sys

import torch

from benchmarks.support.lengths import Window
from benchmarks.support.memory import in_child, peak_of, report
from benchmarks.support.step_options import StepOptions, build, head, open_setup, some_windows
from benchmarks.support.timing import Failure

MODULE = "benchmarks.support.step_memory"
MIB = 2**20


def child(job: dict) -> None:
    """One variant alone: bytes after loading, after a step on one row, and at the peak."""
    options = StepOptions(**job["options"])
    options.check()
    setup, corpus = open_setup(options)
    device = setup.device
    step = build(job["variant"], setup, options)
    loaded = peak_of(lambda: None, device).start
    step.start()
    work = some_windows(corpus, options)
    for window in work[:2]:
        step.step(Window([window.rows[:1]] * options.accum, window.with_view))
    peak = peak_of(lambda: [step.step(window) for window in work], device)
    report({"loaded": loaded, "warm": peak.start, "peak": peak.peak})


def peak_memory(name: str, options: StepOptions) -> dict[str, int] | Failure:
    """Bytes of one variant: loaded, warm (a step on one row was taken) and peak."""
    job = {"variant": name, "options": dataclasses.asdict(options)}
    return in_child(MODULE, job, torch.get_num_threads())


def ask_double(options: StepOptions) -> list[dict]:
    """Ours at twice the micro-batch against naive's peak -> a row each."""
    twice = dataclasses.replace(options, micro_batch=2 * options.micro_batch)
    asked = {"naive": options, "ours": twice}
    found = {name: peak_memory(name, of) for name, of in asked.items()}
    table = [{**head(name, of), **memory_columns(found[name])} for name, of in asked.items()]
    fits = "unknown"
    if isinstance(found["ours"], Failure):
        fits = "no"
    elif isinstance(found["naive"], dict):
        fits = "yes" if found["ours"]["peak"] <= found["naive"]["peak"] else "no"
    for row in table:
        row["question"] = f"ours at twice naive's micro-batch within its peak: {fits}"
    return table


def ask_largest(options: StepOptions) -> list[dict]:
    """Double the micro-batch of each variant until it fails or passes the limit -> a row each."""
    table = []
    for name in options.only:
        tried, row = options, None
        while True:
            found = peak_memory(name, tried)
            if isinstance(found, Failure) or found["peak"] > options.largest * 2**30:
                break
            row = {**head(name, tried), **memory_columns(found)}
            tried = dataclasses.replace(tried, micro_batch=2 * tried.micro_batch)
        row = row or {**head(name, tried), **memory_columns(found)}
        table.append({**row, "question": f"largest micro-batch within {options.largest:g} GiB"})
    return table


def memory_columns(found: dict[str, int] | Failure | None) -> dict:
    if found is None:
        return {}
    if isinstance(found, Failure):
        return {"status": found.reason}
    return {
        "status": "ok",
        "peak_mib": round(found["peak"] / MIB, 1),
        "peak_less_loaded_mib": round((found["peak"] - found["loaded"]) / MIB, 1),
        "peak_less_one_row_mib": round((found["peak"] - found["warm"]) / MIB, 1),
    }


if __name__ == "__main__":
    child(json.loads(sys.argv[sys.argv.index("--child") + 1]))
