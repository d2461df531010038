"""The interface that every latent family implements.

Legend: B rows of a batch, N rows of a larger set, D pooled width, F numbers of one row's vector.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from cdpvae.config import ModelConfig
from cdpvae.latents.information import MutualInformation, information_from_densities
from cdpvae.latents.noise import GeneratorNoise, Noise
from cdpvae.latents.priors.base import Prior


@dataclass(frozen=True)
class Code:
    """What a family infers of B texts: a dataclass of tensors, each with the rows first."""

    @property
    def num_rows(self) -> int:
        """B."""
        return int(next(iter(self.tensors().values())).shape[0])

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of the fields."""
        return [field.name for field in dataclasses.fields(cls)]

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields by name."""
        return {name: getattr(self, name) for name in self.names()}

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return a code whose every tensor is `function` of this one's."""
        return type(self)(**{name: function(value) for name, value in self.tensors().items()})

    def rows(self, start: int, stop: int | None = None) -> Self:
        """Return the rows from `start` to before `stop`, as views."""
        return self.map(lambda tensor: tensor[start:stop])

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Self:
        """Return the same numbers in another float dtype, on another device; integers stay."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)

        return self.map(move)

    def detach(self) -> Self:
        """Return the same numbers without their graph."""
        return self.map(lambda tensor: tensor.detach())

    @classmethod
    def concat(cls, codes: Sequence[Self]) -> Self:
        """Return the rows of all codes in order. Raises ValueError for no code."""
        if not codes:
            raise ValueError("no code to put together; give at least one")
        return cls(**{name: torch.cat([getattr(c, name) for c in codes]) for name in cls.names()})


class Latent(nn.Module, ABC):
    """A family of latent codes: q(z|x), its prior, and what is known about both.

    shape: of one row's z, what the projector reads; (Z,) for one vector, (C, Z) for C concepts,
    (0,) for no latent at all. prior: p(z). Losses and figures are in nats.
    """

    # Whether a text is read at all: without it there is no encoder pass and no soft prompt.
    reads_text: ClassVar[bool] = True
    code_type: ClassVar[type[Code]]
    # Variances above which a dimension counts as active, for families with such dimensions.
    activity_thresholds: ClassVar[tuple[float, ...]] = ()

    shape: tuple[int, ...]
    prior: Prior

    @property
    def flat_dim(self) -> int:
        """F, numbers of one row's z."""
        return math.prod(self.shape)

    @classmethod
    @abstractmethod
    def of(cls, config: ModelConfig, input_dim: int) -> Latent:
        """Build the family of the settings for pooled texts of `input_dim` numbers."""

    @abstractmethod
    def infer(self, pooled_BD: Tensor) -> Code:
        """Return q(z|x) of B pooled texts (B, D)."""

    @abstractmethod
    def sample(self, code: Code, noise: Noise) -> Tensor:
        """Draw one z of each row -> (B, *shape), fp32, differentiable in the code."""

    @abstractmethod
    def mean(self, code: Code) -> Tensor:
        """Return the z that evaluation uses without noise -> (B, *shape), fp32."""

    def flat(self, code: Code) -> Tensor:
        """Return one vector a row (B, F) for contrast and probes: the mean, flattened."""
        return self.mean(code).flatten(1)

    def gradient_point(self, code: Code) -> Tensor:
        """Return the tensor of the code at which the terms' gradients are compared: the first.

        Every loss that reaches the encoder must reach it through this tensor.
        """
        return next(iter(code.tensors().values()))

    def active_units(self, code: Code, threshold: float) -> int | None:
        """Count dimensions that vary by more than `threshold` over the rows; None without any."""
        return None

    @abstractmethod
    def penalties(self, code: Code) -> Mapping[str, Tensor]:
        """Return what using the latent costs, not reduced: (B,) or (B, F) nats by name.

        `kl` is the rate: it gets beta and free bits, which need means over all ranks. Every other
        penalty becomes a term of its own, summed over F, with weight 1: a family scales it itself.
        """

    def log_q(self, z: Tensor, code: Code) -> Tensor | None:
        """Return log q(z_m | x_n) for every z (M, *shape) and every row of the code -> (M, N).

        The aggregate posterior is a logsumexp over N. None for a family without a density.
        """
        return None

    def log_q_of_dim(self, points: Tensor, dim: int, code: Code) -> Tensor | None:
        """Return log q(z_dim = point | x_n) of one number of z, for points (G,) -> (G, N).

        None for a family whose numbers have no density of their own.
        """
        return None

    def exact_kl(self, code: Code) -> Tensor | None:
        """Return KL(q(z|x) || p(z)) of each row (B,), or None where it has no closed form."""
        return None

    def information(self, code: Code, *, seed: int) -> MutualInformation | None:
        """Estimate I(x; z) over the rows of the code with one z a row, drawn with `seed`.

        None for a family without a density.
        """
        # One z of each row; a family without a density has no estimate.
        z = self.sample(code, GeneratorNoise(torch.Generator().manual_seed(seed)))
        if self.log_q(z[:1], code) is None:
            return None

        def log_q(chunk: Tensor) -> Tensor:
            density = self.log_q(chunk, code)
            assert density is not None
            return density

        return information_from_densities(log_q, z)

    @abstractmethod
    def interpolate(self, a: Tensor, b: Tensor, steps: int, mode: str) -> Tensor:
        """Return latents on the way from a to b, ends included; steps come first.

        a, b (*shape) or (B, *shape): the ends.
        steps: how many, at least 2.
        mode: how the way is laid, as far as the family knows several.
        """

    @abstractmethod
    def health(self, code: Code, *, seed: int, active_variance: float) -> dict[str, float]:
        """Return the figures by which this family's state is judged, over the rows of `code`.

        seed: of the random draws that an estimator makes. active_variance: a dimension counts as
        used when its mean varies by more than this over the rows.
        """


def variance_over_rows(vectors_NF: Tensor) -> Tensor:
    """Return the variance of each number over rows, with N-1 -> (F,) fp64; zeros for one row."""
    if vectors_NF.shape[0] < 2:
        return torch.zeros(vectors_NF.shape[1], dtype=torch.float64)
    return vectors_NF.double().var(dim=0, unbiased=True)
