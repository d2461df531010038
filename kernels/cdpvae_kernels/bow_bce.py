"""Bag-of-words losses: what z alone says about which tokens the text holds.

Shapes: `B` rows, `Z` latent, `V` vocabulary, `T` packed tokens.

On a GPU both losses are one operator, `cdpvae_kernels::bow`, which also computes the gradient of z
and what that of the head needs, so that the weight is read once (the categorical loss: twice).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cdpvae_kernels import reference, tiled
from cdpvae_kernels.checks import FLOATS, check_packing, check_range, check_tensor, has_values
from cdpvae_kernels.dispatch import choose_name, from_triton

# The widest z of which a block of rows and its gradient fit in the registers of a GPU.
WIDEST_ON_GPU = 256

_sums = {False: from_triton("bow", "bce"), True: from_triton("bow", "categorical")}
_head_gradients = from_triton("bow", "head_gradients")


def bow_bce(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    ids: Tensor,
    cu_seqlens: Tensor,
    *,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """Binary cross-entropy with logits z W^T + b against the *set* of each row's ids.

    z: (B, Z) float. weight: (V, Z) float. bias: (V,) float. ids: (T,) int64 or int32, rows end to
    end; a repeated id counts once, a row without ids is all negatives. cu_seqlens: (B+1,) int32.
    reduction: "mean" or "sum", over rows and vocabulary. No rows give 0.
    Returns a scalar in nats, fp32 (fp64 if any of z, weight, bias is), and computes in that dtype.
    Differentiable once in z, weight and bias. On a GPU, where z and weight have one half precision,
    d loss / d logits is rounded to it before it is multiplied with them; ids are not checked there
    (`bow_bce` leaves those outside the vocabulary out).
    Raises ValueError for wrong shapes or dtypes, ids outside the vocabulary, another reduction, and
    for impl="triton" with Z above 256, which the reference computes.
    """
    _check(z, weight, bias, ids, cu_seqlens)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}; it must be 'mean' or 'sum'")
    name = _choose("bow_bce", impl, z, weight, bias, ("reference", "tiled", "triton"))
    if name == "reference":
        return reference.bow_bce(z, weight, bias, ids, cu_seqlens, reduction)
    if name == "tiled":
        total = tiled.bow_bce(z, weight, bias, ids, cu_seqlens)
    else:
        total = _through_operator(z, weight, bias, ids, cu_seqlens, categorical=False)
    cells = z.shape[0] * weight.shape[0]
    return total / max(cells, 1) if reduction == "mean" else total


def bow_categorical(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    ids: Tensor,
    cu_seqlens: Tensor,
    *,
    impl: str | None = None,
) -> Tensor:
    """Per row the mean over its tokens of -log softmax(z W^T + b)[token], then the mean over rows.

    Repeated ids count each time; a row without tokens contributes 0, no rows give 0. Arguments,
    dtypes and errors as for `bow_bce`. Zhao et al. 2017, "Learning discourse-level diversity for
    neural dialog models", with the sum over tokens divided by their count.
    """
    _check(z, weight, bias, ids, cu_seqlens)
    names = ("reference", "triton")
    if _choose("bow_categorical", impl, z, weight, bias, names) == "reference":
        return reference.bow_categorical(z, weight, bias, ids, cu_seqlens)
    total = _through_operator(z, weight, bias, ids, cu_seqlens, categorical=True)
    return total / max(z.shape[0], 1)


def _check(z: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, cu_seqlens: Tensor) -> None:
    check_packing(ids, cu_seqlens)
    check_tensor("z", z, (cu_seqlens.numel() - 1, "Z"), FLOATS)
    check_tensor("weight", weight, ("V", z.shape[1]), FLOATS)
    check_tensor("bias", bias, (weight.shape[0],), FLOATS)
    check_range("ids", ids, 0, weight.shape[0])


def _choose(
    op: str, impl: str | None, z: Tensor, weight: Tensor, bias: Tensor, names: tuple[str, ...]
) -> str:
    """The one of `names` that runs; the widest dtype, then bf16, decide what can."""
    dtypes = (z.dtype, weight.dtype, bias.dtype)
    decisive = (torch.float64, torch.bfloat16)
    dtype = next((d for d in decisive if d in dtypes), z.dtype)
    wide = z.shape[1] > WIDEST_ON_GPU
    if wide and impl == "triton":
        raise ValueError(
            f"impl='triton': {op} got z of width {z.shape[1]}; its kernels take at most "
            f"{WIDEST_ON_GPU}, the reference any"
        )
    # Too wide for the kernels; and tiles are cut by the tokens' values, which a traced graph lacks.
    unfit = {"triton" if wide else "", "tiled" if not has_values(z) else ""}
    if impl is None:
        names = tuple(name for name in names if name not in unfit)
    return choose_name(op, impl, z.device, dict.fromkeys(names), dtype)


def _through_operator(z, weight, bias, ids, cu_seqlens, *, categorical: bool) -> Tensor:
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
