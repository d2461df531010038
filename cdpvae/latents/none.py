"""No latent: the baseline that a latent is measured against.

The same decoder, trainer and data, but no encoder pass, no prompts and no z. Every tensor of this
family has a width of 0, so that what computes with it needs no other path.

Legend: B rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from cdpvae.config import ModelConfig
from cdpvae.latents.base import Code, Latent
from cdpvae.latents.noise import Noise
from cdpvae.latents.priors.base import Prior
from cdpvae.latents.priors.standard import StandardNormal


@dataclass(frozen=True)
class EmptyCode(Code):
    """Nothing about B texts. empty (B, 0)."""

    empty: Tensor


class NoLatent(Latent):
    """A family whose z has no number."""

    reads_text: ClassVar[bool] = False
    code_type: ClassVar[type[Code]] = EmptyCode

    def __init__(self) -> None:
        super().__init__()
        self.shape = (0,)
        self.prior: Prior = StandardNormal(self.shape)

    @classmethod
    def of(cls, config: ModelConfig, input_dim: int) -> NoLatent:
        """Build the family; nothing of the settings concerns it."""
        return cls()

    def infer(self, pooled_BD: Tensor) -> EmptyCode:
        """Return an empty code of B rows."""
        return EmptyCode(pooled_BD.new_zeros((pooled_BD.shape[0], 0)).float())

    def sample(self, code: Code, noise: Noise) -> Tensor:
        """Return z (B, 0)."""
        return self.mean(code)

    def mean(self, code: Code) -> Tensor:
        """Return z (B, 0)."""
        assert isinstance(code, EmptyCode)
        return code.empty

    def penalties(self, code: Code) -> Mapping[str, Tensor]:
        """Return no penalty."""
        return {}

    def interpolate(self, a: Tensor, b: Tensor, steps: int, mode: str) -> Tensor:
        """Raise ValueError: there is nothing between two texts without a latent."""
        raise ValueError("a model without a latent has nothing to interpolate; train one with it")

    def health(self, code: Code, *, seed: int, active_variance: float) -> dict[str, float]:
        """Return that no dimension is active."""
        return {"active_unit_ratio": 0.0}
