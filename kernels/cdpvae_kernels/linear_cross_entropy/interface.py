"""What every implementation of the reconstruction loss takes and returns.

An implementation is a function

    linear_cross_entropy(hidden, weight, targets, positions, scale, options) -> Losses

of hidden (T, D), weight (V, D), targets (M,) int64, positions (M,) int64 or None for the first M
positions in order, scale () = 1 / divisor, and `Options`. The public function has checked all of
them. All targets are valid, unless `Options.ignores` says otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# The target of a position that counts nothing, where `Options.ignores` is set.
IGNORED = -1


class Options(NamedTuple):
    """The settings of one pass.

    A named tuple, since the operator takes them one by one: `*options` takes them apart,
    `Options(*settings)` puts them together again.

    chunk_bytes: budget in bytes of the logits held at a time; None picks by device.
    z_loss: the factor of lse^2, which is added to each position's loss.
    softcap: the logits become softcap * tanh(logits / softcap); None leaves them as they are.
    want_hidden: whether to compute the gradient of the hidden states.
    want_weight: whether to compute the gradient of the weight.
    ignores: whether targets may be IGNORED; loss, lse and gradients of such a position are 0.
    """

    chunk_bytes: int | None = None
    z_loss: float = 0.0
    softcap: float | None = None
    want_hidden: bool = False
    want_weight: bool = False
    ignores: bool = False


class Losses(NamedTuple):
    """The outcome of one pass; sums and logits are fp32, fp64 for fp64 inputs.

    nll (M,): -log p(target), in nats, without the z-loss.
    lse (M,): log of the sum of exp(logits).
    grad_positions (M, D): scale * d loss / d hidden at each target's position, in the dtype of
        `hidden`; None if not wanted.
    grad_weight (V, D): scale * d loss / d weight, in the dtype of `weight`; None if not wanted.
    """

    nll: Tensor
    lse: Tensor
    grad_positions: Tensor | None
    grad_weight: Tensor | None
