"""Where a step spends its time: named calls are timed, each without the calls inside it.

The device is synchronised where a phase begins and ends, so the phases add up to somewhat more
than an undisturbed step takes: they give shares, and `timing.py` gives the time.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

from benchmarks.support.timing import synchronize

Timed = tuple[object, str, str]
"""(object, name of its method, phase)"""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class PhaseClock:
    """Add up seconds by phase, in `seconds`. A timed call inside another one counts once."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}
        self._inner: list[float] = []

    @contextmanager
    def watching(self, timed: list[Timed]) -> Iterator[None]:
        """Time the calls of these methods on these objects inside the context."""
        # An attribute of the instance hides the method of the class.
        for owner, name, phase in timed:
            setattr(owner, name, self._wrap(getattr(owner, name), phase))
        try:
            yield
        finally:
            for owner, name, _ in timed:
                # The class's own method was only hidden by the instance's attribute.
                delattr(owner, name)

    def _wrap(self, method: Callable[Arguments, Result], phase: str) -> Callable[Arguments, Result]:
        @functools.wraps(method)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            synchronize(self.device)
            start = time.perf_counter()
            # The calls inside this one add their seconds to the last entry.
            self._inner.append(0.0)
            try:
                return method(*args, **kwargs)
            finally:
                synchronize(self.device)
                taken = time.perf_counter() - start
                own = taken - self._inner.pop()
                self.seconds[phase] = self.seconds.get(phase, 0.0) + own
                if self._inner:
                    self._inner[-1] += taken

        return call
