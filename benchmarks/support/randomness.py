"""Random draws that all implementations share, so that their losses can be compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Draws:
    """The random draws of one micro-batch of B rows.

    noise_BZ: (B, Z) fp32, the posterior's. response_inputs: word-dropped response ids per row.
    views: ids of the augmented instruction per row.
    """

    noise_BZ: Tensor
    response_inputs: list[list[int]]
    views: list[list[int]]


@contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """Set every dropout rate in `module` to 0 inside the context."""
    # A rate is that of an `nn.Dropout`, or a float attribute that attention layers call dropout.
    rates: list[tuple[nn.Module, str, float]] = []
    for owner in module.modules():
        if isinstance(owner, nn.Dropout):
            rates.append((owner, "p", owner.p))
        if isinstance(rate := getattr(owner, "dropout", None), float):
            rates.append((owner, "dropout", rate))
    try:
        for owner, name, _ in rates:
            setattr(owner, name, 0.0)
        yield
    finally:
        for owner, name, rate in rates:
            setattr(owner, name, rate)
