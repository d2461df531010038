"""Where a step spends its time: named calls are timed, each without the calls inside it.

The device is synchronised at every border, so the phases add up to somewhat more than a step
takes undisturbed; they tell shares, and `timing.py` tells the time.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from benchmarks.support.timing import synchronize

Timed = tuple[object, str, str]
"""(object, name of its method, phase)"""


class PhaseClock:
    """`seconds`: by phase, what the timed calls took, calls inside them taken off."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}
        self._inner: list[float] = []

    @contextmanager
    def watching(self, timed: list[Timed]) -> Iterator[None]:
        """Inside, calls of these methods on these objects are timed."""
        for owner, name, phase in timed:
            setattr(owner, name, self._wrap(getattr(owner, name), phase))
        try:
            yield
        finally:
            for owner, name, _ in timed:
                # The class's own method was only hidden by the instance's attribute.
                delattr(owner, name)

    def _wrap(self, method: Callable, phase: str) -> Callable:
        @functools.wraps(method)
        def call(*args, **kwargs):
            synchronize(self.device)
            start = time.perf_counter()
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
