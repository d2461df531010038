"""Peak memory of one variant of the training step, in a process of its own.

`peak_memory` starts `python -m benchmarks.support.step_memory --child JOB`. The process loads the
variant, takes a step on one row with and one without the view, so that code is loaded and the
optimizer has its state, and then runs the step batches of the benchmark. `ask_double` and
`ask_largest` answer what micro-batch a given memory allows.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import torch

from benchmarks.support.lengths import StepBatch
from benchmarks.support.memory import in_child, peak_of, report
from benchmarks.support.step_options import (
    StepOptions,
    build,
    identify,
    measured_batches,
    open_setup,
)
from benchmarks.support.timing import Failure

MODULE = "benchmarks.support.step_memory"
MIB = 2**20


def child(job: dict[str, Any]) -> None:
    """Measure one variant alone: bytes after loading, after a step on one row, and at the peak."""
    # Load the variant, as the parent would.
    options = StepOptions(**job["options"])
    options.check()
    setup, corpus = open_setup(options)
    device = setup.device
    step = build(job["variant"], setup, options)
    loaded = peak_of(lambda: None, device).start
    # Steps on one row load code and make the optimizer's state.
    step.start()
    work = measured_batches(corpus, options)
    for batch in work[:2]:
        step.step(StepBatch([batch.rows[:1]] * options.accum, batch.with_view))
    peak = peak_of(lambda: [step.step(batch) for batch in work], device)
    report({"loaded": loaded, "warm": peak.start, "peak": peak.peak})


def peak_memory(name: str, options: StepOptions) -> dict[str, int] | Failure:
    """Measure one variant's bytes: loaded, warm (a step on one row was taken) and peak."""
    job = {"variant": name, "options": dataclasses.asdict(options)}
    return in_child(MODULE, job, torch.get_num_threads())


def ask_double(options: StepOptions) -> list[dict[str, Any]]:
    """Compare ours at twice the micro-batch with naive's peak -> a row each."""
    # Ours gets twice the rows of naive.
    twice = dataclasses.replace(options, micro_batch=2 * options.micro_batch)
    asked = {"naive": options, "ours": twice}
    found = {name: peak_memory(name, of) for name, of in asked.items()}
    table: list[dict[str, Any]] = [
        {**identify(name, of), **memory_columns(found[name])} for name, of in asked.items()
    ]
    # A naive step that does not run at all has no peak to compare with.
    ours, naive, fits = found["ours"], found["naive"], "unknown"
    if isinstance(ours, Failure):
        fits = "no"
    elif not isinstance(naive, Failure):
        fits = "yes" if ours["peak"] <= naive["peak"] else "no"
    for row in table:
        row["question"] = f"ours at twice naive's micro-batch within its peak: {fits}"
    return table


def ask_largest(options: StepOptions) -> list[dict[str, Any]]:
    """Double the micro-batch of each variant until it fails or passes the limit -> a row each.

    The limit is `options.largest`, in GiB.
    """
    assert options.largest is not None
    table = []
    for name in options.only:
        # The row is that of the last micro-batch within the limit, or of the first attempt.
        tried, row = options, None
        while True:
            found = peak_memory(name, tried)
            if isinstance(found, Failure) or found["peak"] > options.largest * 2**30:
                break
            row = {**identify(name, tried), **memory_columns(found)}
            tried = dataclasses.replace(tried, micro_batch=2 * tried.micro_batch)
        row = row or {**identify(name, tried), **memory_columns(found)}
        table.append({**row, "question": f"largest micro-batch within {options.largest:g} GiB"})
    return table


def memory_columns(found: dict[str, int] | Failure | None) -> dict[str, Any]:
    """Convert bytes to the columns of a row, in MiB. None: memory was not measured."""
    if found is None:
        return {}
    # A failure has no figures, but a reason.
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
