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
        """Add one micro-batch. total (): the sum of its weighted terms.

        Raises ValueError when two terms report a figure of the same name.
        """
        figures = {"total": total.detach().float()}
        for term in terms:
            found = term.figures()
            if twice := sorted(found.keys() & figures.keys()):
                raise ValueError(f"two terms report {twice[0]!r}; give each figure its own name")
            figures |= found
        for name, value in figures.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.count += 1

    def reduce(self, world_size: int) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Return scalars and vectors by name, means over micro-batches and ranks."""
        packed = torch.cat([value.flatten() for value in self.sums.values()])
        packed = all_reduce_sum(packed) / (self.count * world_size)
        # Cut the one tensor that was communicated into its figures again.
        scalars, vectors = {}, {}
        # One copy to the host: each would wait for the device.
        numbers, start = packed.tolist(), 0
        for name, value in self.sums.items():
            end = start + value.numel()
            if value.dim() == 0:
                scalars[name] = numbers[start]
            else:
                vectors[name] = packed[start:end].view_as(value)
            start = end
        return scalars, vectors
