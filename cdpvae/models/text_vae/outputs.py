"""What the passes of the model hand on.

Legend: B rows, T packed tokens, P prompts, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cdpvae.latents import Code


@dataclass(frozen=True)
class Decoded:
    """The decoder's packed output.

    hidden (T + B*P, D): in the prefixed packing, longer by the instructions where the decoder reads
    them. positions (T,) int64: where each position of the response is in `hidden`. predicted
    (T, D): hidden states of the response's positions that know z and their place but no word; None
    without `positional_slots`.
    """

    hidden: Tensor
    positions: Tensor
    predicted: Tensor | None = None


@dataclass(frozen=True)
class ModelOutput:
    """What one forward pass gives.

    code: q(z|x) of the B instructions. view: that of the augmented ones, where the batch has them.
    z (B, *latent.shape): what the decoder was given. decoded: its hidden states.
    """

    code: Code
    view: Code | None
    z: Tensor
    decoded: Decoded


def flat_z(z: Tensor | None) -> Tensor:
    """Return z (B, *latent.shape) as one vector a row, (B, F). Raises ValueError for None."""
    if z is None:
        raise ValueError("z=None: only a model without a latent takes no z")
    return z.flatten(1)
