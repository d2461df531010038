"""Cross-entropy of a linear head without ever holding the logits whole.

Shapes: `T` packed positions, `N` target positions, `M` valid ones among them, `D` hidden,
`V` vocabulary.

The logits of one row of Llama-3.1 take 0.5 MB in fp32, those of a batch gigabytes. Here a chunk of
rows at a time goes through the head, its loss and the gradient of its hidden states, and only the
latter, (T, D), is kept for the backward pass.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cdpvae_kernels import reference
from cdpvae_kernels.checks import (
    FLOATS,
    INTEGERS,
    check_range,
    check_tensor,
    has_values,
    readable,
)
from cdpvae_kernels.dispatch import choose

_IMPLEMENTATIONS = {"reference": reference.linear_cross_entropy}


class Stats(NamedTuple):
    """Per position, without gradient, 0 where ignored; fp32 (fp64 for fp64 inputs), in nats."""

    nll: Tensor  # (N,) -log p(target), without the z-loss
    lse: Tensor  # (N,) log of the sum of exp(logits)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    divisor: float | Tensor | None = None,
    ignore_index: int | None = -100,
    chunk_bytes: int | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    return_stats: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Stats]:
    """Sum over valid positions of -log softmax(hidden W^T)[target], divided by `divisor`.

    hidden: (T, D) float. weight: (V, D), dtype of `hidden`.
    targets: (T,) int64 or int32; with `rows` (N,), int64 or int32, targets is (N,) and rows[i] is
    the row of `hidden` that predicts targets[i]; a row may occur more than once.
    divisor: a positive number or a 0-d tensor; the number of valid targets if None.
    ignore_index: the target that marks a position as not valid. None says that all are valid,
    which on a GPU saves the host a wait for the device.
    chunk_bytes: budget of the logits held at a time (at least one row); None picks by device.
    z_loss: adds z_loss * lse^2 per position inside the same sum.
    softcap: the logits become softcap * tanh(logits / softcap).
    Returns a scalar fp32 (fp64 for fp64 inputs), or (scalar, `Stats`). Logits and reductions are in
    that dtype. For bf16 and fp16 inputs on a GPU, p - onehot is rounded to the input dtype before
    it is multiplied with the weight; gradients have the dtype of their tensors.
    Differentiable once in `hidden`, and in `weight` if it requires a gradient.
    With no valid position the loss is exactly 0 and so are the gradients, whatever the divisor.
    Raises ValueError for wrong shapes or dtypes, targets or rows out of range, and settings
    outside their rules.
    """
    _check_tensors(hidden, weight, targets, rows, ignore_index)
    _check_settings(chunk_bytes, z_loss, softcap)
    run = choose("linear_cross_entropy", impl, hidden.device, _IMPLEMENTATIONS)
    kept = _valid_positions(targets, ignore_index)
    num_positions = targets.numel()
    if kept is not None:
        targets = targets.index_select(0, kept)
        rows = kept if rows is None else rows.index_select(0, kept)
    scale = _scale(divisor, targets.numel())
    loss, nll, lse = run(hidden, weight, targets, rows, scale, chunk_bytes, z_loss, softcap)
    if not return_stats:
        return loss
    return loss, Stats(_spread(nll, kept, num_positions), _spread(lse, kept, num_positions))


def _check_tensors(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor | None, ignore_index: int | None
) -> None:
    check_tensor("hidden", hidden, ("T", "D"), FLOATS)
    check_tensor("weight", weight, ("V", hidden.shape[1]), (hidden.dtype,))
    if rows is None:
        check_tensor("targets", targets, (hidden.shape[0],), INTEGERS)
    else:
        check_tensor("rows", rows, ("N",), INTEGERS)
        check_range("rows", rows, 0, hidden.shape[0])
        check_tensor("targets", targets, (rows.shape[0],), INTEGERS)
    if ignore_index is None:
        check_range("targets", targets, 0, weight.shape[0])
    elif readable(targets):
        valid = targets[targets != ignore_index]
        check_range(f"targets (ignore_index={ignore_index})", valid, 0, weight.shape[0])


def _check_settings(chunk_bytes: int | None, z_loss: float, softcap: float | None) -> None:
    if chunk_bytes is not None and chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes={chunk_bytes}; it must be positive, or None")
    if not (z_loss >= 0.0 and math.isfinite(z_loss)):
        raise ValueError(f"z_loss={z_loss}; it must be finite and at least 0")
    if softcap is not None and not (softcap > 0.0 and math.isfinite(softcap)):
        raise ValueError(f"softcap={softcap}; it must be finite and positive, or None")


def _valid_positions(targets: Tensor, ignore_index: int | None) -> Tensor | None:
    """Indices (M,) of the valid targets, or None when all of them are valid.

    Without data (shape propagation) how many are valid is unknown: all are taken.
    """
    if ignore_index is None or not has_values(targets):
        return None
    kept = (targets != ignore_index).nonzero().squeeze(1)
    return None if kept.numel() == targets.numel() else kept


def _scale(divisor: float | Tensor | None, num_valid: int) -> float | Tensor:
    """1 / divisor, and 0 where nothing is valid (0 / 0 would be NaN)."""
    if isinstance(divisor, Tensor):
        if divisor.dim() != 0:
            raise ValueError(
                f"divisor has shape {tuple(divisor.shape)}; it must be a number or a 0-d tensor"
            )
        if readable(divisor):
            divisor = divisor.item()
    if num_valid == 0:
        return 0.0
    if divisor is None:
        return 1.0 / num_valid
    if isinstance(divisor, Tensor):
        return divisor.detach().to(torch.float64).reciprocal()
    if not (divisor > 0 and math.isfinite(divisor)):
        raise ValueError(
            f"divisor={divisor} with {num_valid} valid targets; it must be finite and positive, "
            "or None for the number of valid targets"
        )
    return 1.0 / divisor


def _spread(values: Tensor, kept: Tensor | None, num_positions: int) -> Tensor:
    if kept is None:
        return values
    return values.new_zeros(num_positions).index_copy_(0, kept, values)
