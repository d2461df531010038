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
from cdpvae.latents.information import MutualInformation, mutual_information
from cdpvae.latents.noise import GeneratorNoise, Noise
from cdpvae.latents.priors.base import Prior


@dataclass(frozen=True)
class Code:
    """What a family infers of B texts: a dataclass of tensors, each with the rows first."""

    @property
    def num_rows(self) -> int:
        """B."""
        return int(next(iter(self.tensors().values())).shape[0])

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return a code whose every tensor is `function` of this one's."""
        return type(self)(**{name: function(value) for name, value in self.tensors().items()})

    def rows(self, start: int, stop: int | None = None) -> Self:
        """Return the rows from `start` to before `stop`, as views."""
        return self.map(lambda tensor: tensor[start:stop])

    def detach(self) -> Self:
        """Return the same numbers without their graph."""
        return self.map(lambda tensor: tensor.detach())

    @classmethod
    def concat(cls, codes: Sequence[Self]) -> Self:
        """Return the rows of all codes in order. Raises ValueError for no code."""
        if not codes:
            raise ValueError("no code to put together; give at least one")
        fields = dataclasses.fields(cls)
        return cls(**{f.name: torch.cat([getattr(c, f.name) for c in codes]) for f in fields})


class Latent(nn.Module, ABC):
    """A family of latent codes: q(z|x), its prior, and what is known about both.

    shape: of one row's z, what the projector reads; (Z,) for one vector, (C, Z) for C concepts,
    (0,) for no latent at all. prior: p(z). Losses and figures are in nats.
    """

    # Whether a text is read at all: without it there is no encoder pass and no soft prompt.
    reads_text: ClassVar[bool] = True
    code_type: ClassVar[type[Code]]

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

    @abstractmethod
    def penalties(self, code: Code) -> Mapping[str, Tensor]:
        """Return what using the latent costs, not reduced: (B,) or (B, F) nats by name.

        `kl` is the rate: it gets beta and free bits, which need means over all ranks. Every other
        penalty becomes a term of its own with weight 1, so a family scales it itself.
        """

    def log_q(self, z: Tensor, code: Code) -> Tensor | None:
        """Return log q(z_m | x_n) for every z (M, *shape) and every row of the code -> (M, N).

        The aggregate posterior is a logsumexp over N. None for a family without a density.
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

        return mutual_information(log_q, z)

    @abstractmethod
    def interpolate(self, a: Tensor, b: Tensor, steps: int, mode: str) -> Tensor:
        """Return `steps` latents on the way from a to b, ends included; steps come first."""

    @abstractmethod
    def health(self, code: Code, *, seed: int, active_variance: float) -> dict[str, float]:
        """Return the figures by which this family's state is judged, over the rows of `code`.

        seed: of the random draws that an estimator makes. active_variance: a dimension counts as
        used when its mean varies by more than this over the rows.
        """
