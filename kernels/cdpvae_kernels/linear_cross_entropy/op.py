"""Cross-entropy of a linear head without ever holding the logits whole.

Shapes: `T` packed positions, `N` target positions, `M` valid ones among them, `D` hidden,
`V` vocabulary.

The logits of one position of Llama-3.1 take 0.5 MB in fp32, those of a batch gigabytes. Here a
chunk of positions at a time goes through the head, its loss and the gradient of its hidden states,
and only the latter, (M, D), is kept for the backward pass.

`torch.compile` and FakeTensor see one operator, `cdpvae_kernels::linear_cross_entropy`.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, Protocol, TypedDict, Unpack, overload

import torch
from torch import Tensor

from cdpvae_kernels.common.autograd import OperatorContext, gradients_of_first
from cdpvae_kernels.common.checks import (
    FLOATS,
    INTEGERS,
    check_range,
    check_tensor,
    has_values,
    readable,
)
from cdpvae_kernels.common.dispatch import choose_name, from_triton
from cdpvae_kernels.common.matmul import accumulation_dtype
from cdpvae_kernels.common.renamed import given_under_either_name
from cdpvae_kernels.linear_cross_entropy import reference, tiled
from cdpvae_kernels.linear_cross_entropy.interface import IGNORED, Options

# How messages, the table of implementations and the folder call the operation.
_NAME = "linear_cross_entropy"
_IMPLEMENTATIONS = {
    "reference": reference.linear_cross_entropy,
    "tiled": tiled.linear_cross_entropy,
    "triton": from_triton(_NAME, "linear_cross_entropy"),
}


class Stats(NamedTuple):
    """Per position, without gradient, 0 where ignored; fp32 (fp64 for fp64 inputs), in nats."""

    # (N,): -log p(target), without the z-loss.
    nll: Tensor
    # (N,): log of the sum of exp(logits).
    lse: Tensor


class _Settings(TypedDict, total=False):
    """The keywords of `linear_cross_entropy` but `return_stats`, for the type checker."""

    positions: Tensor | None
    divisor: float | Tensor | None
    ignore_index: int | None
    chunk_bytes: int | None
    z_loss: float
    softcap: float | None
    impl: str | None
    rows: Tensor | None


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    return_stats: Literal[False] = False,
    **settings: Unpack[_Settings],
) -> Tensor: ...


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    return_stats: Literal[True],
    **settings: Unpack[_Settings],
) -> tuple[Tensor, Stats]: ...


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    positions: Tensor | None = None,
    divisor: float | Tensor | None = None,
    ignore_index: int | None = -100,
    chunk_bytes: int | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    return_stats: bool = False,
    impl: str | None = None,
    rows: Tensor | None = None,
) -> Tensor | tuple[Tensor, Stats]:
    """Sum -log softmax(hidden W^T)[target] over valid positions and divide by `divisor`.

    hidden (T, D): float.
    weight (V, D): in the dtype of `hidden`.
    targets (T,) or (N,): int64 or int32; (N,) together with `positions`.
    positions (N,): int64 or int32; positions[i] is the place in `hidden` that predicts targets[i];
        a position may occur more than once. None: every position has a target.
    divisor: a positive number or a 0-d tensor; the number of valid targets if None.
    ignore_index: the target that marks a position as not valid. None says that all are valid,
        which on a GPU saves the host a wait for the device.
    chunk_bytes: budget of the logits held at a time (at least one position); None picks by device.
    z_loss: adds z_loss * lse^2 per position inside the same sum.
    softcap: the logits become softcap * tanh(logits / softcap).
    return_stats: return the `Stats` too.
    impl: "reference", "tiled" or "triton"; None picks by device.
    rows: the former name of `positions`, still accepted.

    Returns a scalar fp32 (fp64 for fp64 inputs), or (scalar, `Stats`). Logits and reductions are in
    that dtype. For bf16 and fp16 inputs on a GPU, p - onehot is rounded to the input dtype before
    it is multiplied with the weight; gradients have the dtype of their tensors.
    Differentiable once in `hidden`, and in `weight` if it requires a gradient.
    With no valid position the loss is exactly 0 and so are the gradients, whatever the divisor.
    Raises ValueError for wrong shapes or dtypes, targets or positions out of range, and settings
    outside their rules.
    """
    # Refuse what the implementations could not compute, and choose one of them.
    positions = given_under_either_name(_NAME, "rows", "positions", rows, positions)
    _check_tensors(hidden, weight, targets, positions, ignore_index)
    _check_settings(chunk_bytes, z_loss, softcap)
    name = choose_name(_NAME, impl, hidden.device, _IMPLEMENTATIONS, hidden.dtype)

    # Leave out the positions that are not valid, so that their logits are never computed. A traced
    # graph has no values to choose by: there all stay, and the implementation zeroes some.
    ignored = None
    if ignore_index is not None and not has_values(targets):
        ignored = torch.eq(targets, ignore_index)
    num_positions = targets.numel()
    num_valid: int | Tensor = num_positions
    kept = None
    if ignored is not None:
        targets, num_valid = targets.masked_fill(ignored, IGNORED), (~ignored).sum()
    elif (kept := _valid_positions(targets, ignore_index)) is not None:
        targets, num_valid = targets.index_select(0, kept), kept.numel()
        positions = kept if positions is None else positions.index_select(0, kept)

    # Compute the loss, and beside it the gradients that will be asked for.
    grad = torch.is_grad_enabled()
    wanted = (grad and hidden.requires_grad, grad and weight.requires_grad)
    loss, nll, lse, _, _ = _operator(
        hidden,
        weight,
        targets.to(torch.int64),
        None if positions is None else positions.to(torch.int64),
        _scale(divisor, num_valid, hidden),
        name,
        *Options(chunk_bytes, z_loss, softcap, *wanted, ignored is not None),
    )
    if not return_stats:
        return loss
    nll, lse = nll.detach(), lse.detach()
    return loss, Stats(_spread(nll, kept, num_positions), _spread(lse, kept, num_positions))


@torch.library.custom_op("cdpvae_kernels::linear_cross_entropy", mutates_args=())
def _operator(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    positions: Tensor | None,
    scale: Tensor,
    impl: str,
    chunk_bytes: int | None,
    z_loss: float,
    softcap: float | None,
    want_hidden: bool,
    want_weight: bool,
    ignores: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute loss (), nll (M,), lse (M,) and the gradients at the positions and of the weight.

    They are (M, D) and (V, D). One that is not wanted is empty: an operator cannot return None.
    """
    options = Options(chunk_bytes, z_loss, softcap, want_hidden, want_weight, ignores)
    nll, lse, grad_positions, grad_weight = _IMPLEMENTATIONS[impl](
        hidden, weight, targets, positions, scale, options
    )
    # The sum over positions is taken in the dtype of the losses, the scale goes on in fp64.
    total = nll.sum() if z_loss == 0.0 else (nll + z_loss * lse.square()).sum()
    loss = (total * scale).to(nll.dtype)
    if grad_positions is None:
        grad_positions = hidden.new_empty(0, 0)
    if grad_weight is None:
        grad_weight = hidden.new_empty(0, 0)
    return loss, nll, lse, grad_positions, grad_weight


@_operator.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    positions: Tensor | None,
    scale: Tensor,
    impl: str,
    *settings: Any,
) -> tuple[Tensor, ...]:
    options, dtype = Options(*settings), accumulation_dtype(hidden.dtype)
    nll, lse = torch.empty_like(targets, dtype=dtype), torch.empty_like(targets, dtype=dtype)
    grad_shape = (targets.shape[0], hidden.shape[1]) if options.want_hidden else (0, 0)
    grad_weight = torch.empty_like(weight) if options.want_weight else hidden.new_empty(0, 0)
    return nll.new_empty(()), nll, lse, hidden.new_empty(grad_shape), grad_weight


class _Context(OperatorContext, Protocol):
    options: Options
    num_positions: int


def _save(ctx: _Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # The settings are the last inputs, in the order of `Options`.
    hidden, _, _, positions, _, _, *settings = inputs
    _, nll, lse, grad_positions, grad_weight = output
    ctx.num_positions = hidden.shape[0]
    ctx.options = Options(*settings)
    ctx.mark_non_differentiable(nll, lse, grad_positions, grad_weight)
    # Without it, statistics that nobody differentiates would get gradients of zeros.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(positions, grad_positions, grad_weight)


def _backward(
    ctx: _Context, grad_loss: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    hidden = weight = None
    if grad_loss is not None:
        positions, grad_positions, grad_weight = ctx.saved_tensors
        if ctx.options.want_hidden:
            hidden = _scaled_gradient(grad_positions, grad_loss, positions, ctx.num_positions)
        if ctx.options.want_weight:
            weight = _scaled_gradient(grad_weight, grad_loss, None, grad_weight.shape[0])
    return gradients_of_first(ctx, hidden, weight)


_operator.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("cdpvae_kernels::scaled_gradient", mutates_args=())
def _scaled_gradient(
    gradient: Tensor, upstream: Tensor, positions: Tensor | None, num_positions: int
) -> Tensor:
    """Scale `gradient` by `upstream` and, given `positions`, spread it over (num_positions, D).

    An operator without a derivative: a second differentiation is an error, never a wrong number.
    Not in place: a graph that is kept may run its backward again.
    """
    # The product keeps the gradient's dtype: fp32 upstream of a bf16 gradient has no dimensions.
    scaled = gradient * upstream
    if positions is None:
        return scaled
    return reference.scatter_to_positions(scaled, positions, num_positions)


@_scaled_gradient.register_fake
def _(gradient: Tensor, upstream: Tensor, positions: Tensor | None, num_positions: int) -> Tensor:
    shape = gradient.shape if positions is None else (num_positions, gradient.shape[1])
    return gradient.new_empty(shape)


def _check_tensors(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    positions: Tensor | None,
    ignore_index: int | None,
) -> None:
    check_tensor("hidden", hidden, ("T", "D"), FLOATS)
    check_tensor("weight", weight, ("V", hidden.shape[1]), (hidden.dtype,))
    if positions is None:
        check_tensor("targets", targets, (hidden.shape[0],), INTEGERS)
    else:
        check_tensor("positions", positions, ("N",), INTEGERS)
        check_range("positions", positions, 0, hidden.shape[0])
        check_tensor("targets", targets, (positions.shape[0],), INTEGERS)
    if ignore_index is None:
        # Every target counts, so every one must be a token.
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
    """Return the indices (M,) of the valid targets, or None when all of them are valid."""
    if ignore_index is None:
        return None
    # On a GPU the host waits here: how many are valid decides the shapes of all that follows.
    kept = (targets != ignore_index).nonzero().squeeze(1)
    return None if kept.numel() == targets.numel() else kept


def _scale(divisor: float | Tensor | None, num_valid: int | Tensor, hidden: Tensor) -> Tensor:
    """Return 1 / divisor as a 0-d tensor, and 0 where nothing is valid (0 / 0 would be NaN)."""
    # In a traced graph the number of valid targets is a tensor: it stays where it is.
    if isinstance(num_valid, Tensor):
        scale = _scale(num_valid if divisor is None else divisor, 1, hidden)
        return torch.where(num_valid > 0, scale, torch.zeros_like(scale))
    # A divisor on the device stays there: reading it would make the host wait.
    if isinstance(divisor, Tensor):
        if divisor.dim() != 0:
            raise ValueError(
                f"divisor has shape {tuple(divisor.shape)}; it must be a number or a 0-d tensor"
            )
        if not readable(divisor):
            scale = divisor.detach().to(torch.float64).reciprocal()
            return scale if num_valid else torch.zeros_like(scale)
        divisor = divisor.item()
    # A number is checked here, since dividing by 0 would make the loss NaN in silence.
    value = 0.0
    if num_valid:
        divisor = num_valid if divisor is None else divisor
        if not (divisor > 0 and math.isfinite(divisor)):
            raise ValueError(
                f"divisor={divisor} with {num_valid} valid targets; it must be finite and "
                "positive, or None for the number of valid targets"
            )
        value = 1.0 / divisor
    # Filled on the device: a copy from the host would wait for it.
    return torch.full((), value, dtype=torch.float64, device=hidden.device)


def _spread(values: Tensor, kept: Tensor | None, num_positions: int) -> Tensor:
    """Put the values (M,) of valid positions back among all (N,), with zeros elsewhere."""
    if kept is None:
        return values
    return values.new_zeros(num_positions).index_copy_(0, kept, values)
