"""Bag-of-words losses: what z alone says about which tokens the text holds.

Shapes: `B` rows, `Z` latent, `V` vocabulary, `T` packed tokens.

On a GPU both losses are one operator, `cdpvae_kernels::bow`, which also computes the gradient of z
and what that of the head needs, so that the weight is read once (the categorical loss: twice).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cdpvae_kernels.common.dispatch import from_triton

_sums = {
    False: from_triton("bag_of_words", "bce"),
    True: from_triton("bag_of_words", "categorical"),
}
_head_gradients = from_triton("bag_of_words", "head_gradients")


def through_operator(z, weight, bias, ids, cu_seqlens, *, categorical: bool) -> Tensor:
    """The sum over rows, differentiable."""
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
    """(loss () fp32, its gradient of z (B, Z) fp32, its errors d loss / d logits (B, V)).

    What is not wanted is empty: an operator cannot return None.
    """
    loss, grad_z, errors = _sums[categorical](z, weight, bias, ids, cu_seqlens, want_z, want_head)
    return loss, *(loss.new_empty(0, 0) if x is None else x for x in (grad_z, errors))


@_operator.register_fake
def _(z, weight, bias, ids, cu_seqlens, categorical, want_z, want_head):
    fp32 = {"dtype": torch.float32}
    errors_dtype = z.dtype if z.dtype == weight.dtype else torch.float32
    return (
        z.new_empty((), **fp32),
        z.new_empty(z.shape if want_z else (0, 0), **fp32),
        z.new_empty(z.shape[0], weight.shape[0], dtype=errors_dtype)
        if want_head
        else z.new_empty(0, 0, **fp32),
    )


def _save(ctx, inputs, output) -> None:
    z, weight, bias, *_, want_z, want_head = inputs
    _, grad_z, errors = output
    ctx.want_z, ctx.want_head = want_z, want_head
    ctx.dtypes = weight.dtype, bias.dtype
    ctx.mark_non_differentiable(grad_z, errors)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_z, errors, z)


def _backward(ctx, upstream, *_) -> tuple:
    grads: tuple = (None, None, None)
    if upstream is not None:
        wanted = (ctx.want_z, ctx.want_head, ctx.want_head)
        found = _gradients(upstream, *ctx.saved_tensors, ctx.want_z, ctx.want_head, *ctx.dtypes)
        grads = tuple(g if want else None for g, want in zip(found, wanted, strict=True))
    return (*grads, *(None,) * 5)


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
    """Of z (B, Z), weight (V, Z) and bias (V,), each in its dtype; empty where not wanted.

    An operator without a derivative: a second differentiation is an error, never a wrong number.
    """
    of_z = (grad_z * upstream).to(z.dtype) if want_z else z.new_empty(0)
    if not want_head:
        return of_z, z.new_empty(0), z.new_empty(0)
    return of_z, *_head_gradients(errors, z, upstream, weight_dtype, bias_dtype)


@_gradients.register_fake
def _(upstream, grad_z, errors, z, want_z, want_head, weight_dtype, bias_dtype):
    of_z = z.new_empty(z.shape if want_z else 0)
    if not want_head:
        return of_z, z.new_empty(0), z.new_empty(0)
    vocab = errors.shape[1]
    of_weight = z.new_empty(vocab, z.shape[1], dtype=weight_dtype)
    return of_z, of_weight, z.new_empty(vocab, dtype=bias_dtype)
