"""The operator behind both bag-of-words losses on a GPU, and its backward pass.

Shapes: `B` rows, `Z` latent, `V` vocabulary, `T` packed tokens.

Both losses are one operator, `cdpvae_kernels::bow`, which also computes the gradient of z and what
that of the head needs, so that the weight is read once (the categorical loss: twice).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from cdpvae_kernels.common.autograd import OperatorContext, gradients_of_first
from cdpvae_kernels.common.dispatch import from_triton

# Imported, and Triton with them, when they are first called.
_bce = from_triton("bag_of_words", "bce")
_categorical = from_triton("bag_of_words", "categorical")
_head_gradients = from_triton("bag_of_words", "head_gradients")


def through_operator(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    ids: Tensor,
    cu_seqlens: Tensor,
    *,
    categorical: bool,
) -> Tensor:
    """Compute the sum of a loss over rows, (), differentiable once in z, weight and bias.

    z (B, Z), weight (V, Z), bias (V,): float.
    ids (T,): int64 or int32.
    cu_seqlens (B+1,): int32.
    categorical: the categorical loss; else the BCE, summed over the vocabulary too.
    """
    # Gradients are made in the forward pass, so only those that will be asked for.
    grad = torch.is_grad_enabled()
    want_head = grad and (weight.requires_grad or bias.requires_grad)
    want_z = grad and z.requires_grad
    return _operator(z, weight, bias, ids, cu_seqlens, categorical, want_z, want_head)[0]


@torch.library.custom_op("cdpvae_kernels::bow", mutates_args=())
def _operator(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    ids: Tensor,
    cu_seqlens: Tensor,
    categorical: bool,
    want_z: bool,
    want_head: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the loss () fp32, its gradient of z (B, Z) fp32, its errors (B, V).

    The errors are d loss / d logits. What is not wanted is empty: an operator cannot return None.
    """
    run = _categorical if categorical else _bce
    loss, grad_z, errors = run(z, weight, bias, ids, cu_seqlens, want_z, want_head)
    if grad_z is None:
        grad_z = loss.new_empty(0, 0)
    if errors is None:
        errors = loss.new_empty(0, 0)
    return loss, grad_z, errors


@_operator.register_fake
def _(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    ids: Tensor,
    cu_seqlens: Tensor,
    categorical: bool,
    want_z: bool,
    want_head: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = z.new_empty((), dtype=torch.float32)
    grad_z = loss.new_empty(z.shape if want_z else (0, 0))
    if not want_head:
        return loss, grad_z, loss.new_empty(0, 0)
    errors_dtype = z.dtype if z.dtype == weight.dtype else torch.float32
    return loss, grad_z, z.new_empty(z.shape[0], weight.shape[0], dtype=errors_dtype)


class _Context(OperatorContext, Protocol):
    want_z: bool
    want_head: bool
    dtypes: tuple[torch.dtype, torch.dtype]


def _save(ctx: _Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # What backward needs of the weight and the bias is their dtype alone.
    z, weight, bias, *_, want_z, want_head = inputs
    _, grad_z, errors = output
    ctx.want_z, ctx.want_head = want_z, want_head
    ctx.dtypes = weight.dtype, bias.dtype
    ctx.mark_non_differentiable(grad_z, errors)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_z, errors, z)


def _backward(
    ctx: _Context, upstream: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    of_z = of_weight = of_bias = None
    if upstream is not None:
        found = _gradients(upstream, *ctx.saved_tensors, ctx.want_z, ctx.want_head, *ctx.dtypes)
        if ctx.want_z:
            of_z = found[0]
        if ctx.want_head:
            of_weight, of_bias = found[1:]
    return gradients_of_first(ctx, of_z, of_weight, of_bias)


_operator.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("cdpvae_kernels::bow_backward", mutates_args=())
def _gradients(
    upstream: Tensor,
    grad_z: Tensor,
    errors: Tensor,
    z: Tensor,
    want_z: bool,
    want_head: bool,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of z (B, Z), weight (V, Z) and bias (V,), each in its dtype.

    One that is not wanted is empty: an operator cannot return None.
    An operator without a derivative: a second differentiation is an error, never a wrong number.
    """
    # The gradient of z is there and only scaled; that of the head is one more product.
    of_z = (grad_z * upstream).to(z.dtype) if want_z else z.new_empty(0)
    if not want_head:
        return of_z, z.new_empty(0), z.new_empty(0)
    of_weight, of_bias = _head_gradients(errors, z, upstream, weight_dtype, bias_dtype)
    return of_z, of_weight, of_bias


@_gradients.register_fake
def _(
    upstream: Tensor,
    grad_z: Tensor,
    errors: Tensor,
    z: Tensor,
    want_z: bool,
    want_head: bool,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    of_z = z.new_empty(z.shape if want_z else 0)
    if not want_head:
        return of_z, z.new_empty(0), z.new_empty(0)
    vocab = errors.shape[1]
    of_weight = z.new_empty(vocab, z.shape[1], dtype=weight_dtype)
    return of_z, of_weight, z.new_empty(vocab, dtype=bias_dtype)
