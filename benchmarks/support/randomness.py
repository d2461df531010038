"""Randomness handed from one implementation to the others, so that their losses can be compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Draws:
    """Of one micro-batch of B rows.

    noise_BZ: (B, Z) fp32, the posterior's. response_inputs: word-dropped response ids per row.
    views: ids of the augmented instruction per row.
    """

    noise_BZ: Tensor
    response_inputs: list[list[int]]
    views: list[list[int]]


@contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """Every dropout rate in `module` is 0 inside, `nn.Dropout` and `dropout` attributes alike."""
    rates = [(m, "p", m.p) for m in module.modules() if isinstance(m, nn.Dropout)]
    for owner in module.modules():
        if isinstance(rate := getattr(owner, "dropout", None), float):
            rates.append((owner, "dropout", rate))
    try:
        for owner, name, _ in rates:
            setattr(owner, name, 0.0)
        yield
    finally:
        for owner, name, rate in rates:
            setattr(owner, name, rate)
