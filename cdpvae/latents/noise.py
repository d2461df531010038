"""Where random numbers come from when a code or a prior is sampled.

In training and evaluation every number is a Philox function of (seed, stream, sample, epoch,
position): the same under recompute, on any number of ranks, in any packing and after a resume.
Callers who sample by hand give a `torch.Generator`, or nothing.

Legend: B rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cdpvae_kernels import Stream, philox


class Noise(Protocol):
    """Draws for the rows of one batch, fp32."""

    def normal(self, num_rows: int, shape: tuple[int, ...]) -> Tensor:
        """Return standard normal numbers (num_rows, *shape)."""
        ...


@dataclass(frozen=True)
class KeyedNoise:
    """Numbers that depend on the run's seed and each row's place in the data set alone.

    sample_index (B,) int64: index of each row in the data set; its device is that of the result.
    stream: what the numbers are for. impl: passed on to `cdpvae_kernels`.
    """

    seed: int
    stream: Stream
    sample_index: Tensor
    epoch: int
    impl: str | None = None

    def normal(self, num_rows: int, shape: tuple[int, ...]) -> Tensor:
        """Return standard normal numbers (num_rows, *shape); num_rows is B."""
        sample, position = self._counters(num_rows, shape)
        drawn = philox.normal(self.seed, self.stream, sample, self.epoch, position, impl=self.impl)
        return drawn.view(num_rows, *shape)

    def _counters(self, num_rows: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return the sample of each row (B, 1) and the position of each number (1, n)."""
        if num_rows != len(self.sample_index):
            raise ValueError(
                f"{num_rows} rows of noise for {len(self.sample_index)} sample indices"
            )
        # Each number of a row has a position of its own in the row's stream.
        position = torch.arange(math.prod(shape), device=self.sample_index.device)
        return self.sample_index[:, None], position[None, :]


@dataclass(frozen=True)
class GeneratorNoise:
    """Numbers of a generator, or of torch's default one.

    device: where they are drawn, by default where the generator lives.
    """

    generator: torch.Generator | None = None
    device: torch.device | None = None

    def normal(self, num_rows: int, shape: tuple[int, ...]) -> Tensor:
        """Return standard normal numbers (num_rows, *shape)."""
        return torch.randn(num_rows, *shape, generator=self.generator, device=self._place())

    def _place(self) -> torch.device | None:
        if self.device is not None or self.generator is None:
            return self.device
        return self.generator.device
