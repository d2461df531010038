"""The figures of one optimizer step: sums over micro-batches, then means over all ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from cdpvae.batch import Term
from cdpvae.training.distributed import all_reduce_sum


class StepFigures:
    """Collect what the terms of each micro-batch report; `reduce` makes means of it.

    Every micro-batch of a step reports the same names, on every rank.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, total: Tensor, terms: list[Term]) -> None:
        """Add one micro-batch. total (): the sum of its weighted terms."""
        figures = {"total": total.detach().float()}
        for term in terms:
            figures |= term.figures()
        for name, value in figures.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.count += 1

    def reduce(self, world_size: int) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Return scalars and vectors by name, means over micro-batches and ranks."""
        packed = torch.cat([value.flatten() for value in self.sums.values()])
        packed = all_reduce_sum(packed) / (self.count * world_size)
        # Cut the one tensor that was communicated into its figures again.
        scalars, vectors = {}, {}
        parts = packed.split([value.numel() for value in self.sums.values()])
        for (name, value), part in zip(self.sums.items(), parts, strict=True):
            if value.dim() == 0:
                scalars[name] = float(part)
            else:
                vectors[name] = part.view_as(value)
        return scalars, vectors
