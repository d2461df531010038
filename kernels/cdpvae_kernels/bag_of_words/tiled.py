"""The bag-of-words BCE on a CPU: plain PyTorch, a tile of the vocabulary at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from cdpvae_kernels.common.packing import sequence_of
from cdpvae_kernels.common.tiles import tile_bounds

# Of the bag of words: few rows take more columns, up to 1 MB of fp32.
BOW_COLUMNS, BOW_CELLS = 4096, 2**18


def bow_bce(z: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The sum over rows and vocabulary of `reference.bow_bce`; differentiable once."""
    wanted = tuple(torch.is_grad_enabled() and t.requires_grad for t in (z, weight, bias))
    return _BowBCE.apply(z, weight, bias, ids, cu_seqlens, wanted)


class _BowBCE(torch.autograd.Function):
    """The gradients are made beside the loss, tile by tile, and scaled in place in backward.

    A graph that is kept may run its backward again: then they are made anew.
    """

    @staticmethod
    def forward(ctx, z, weight, bias, ids, cu_seqlens, wanted):
        inputs = (z, weight, bias, ids, cu_seqlens)
        ctx.save_for_backward(*inputs)
        ctx.wanted = wanted
        loss, ctx.gradients = _bow_pass(inputs, wanted)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            _, gradients = _bow_pass(ctx.saved_tensors, ctx.wanted)
        scaled = [None if g is None else g.mul_(upstream) for g in gradients]
        return *scaled, None, None, None


def _bow_pass(
    inputs: tuple[Tensor, ...], wanted: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss, and its gradients of z, weight and bias where wanted."""
    z, weight, bias, *_ = inputs
    dtype = _compute_dtype(z, weight, bias)
    x, loss = z.to(dtype), z.new_zeros((), dtype=dtype)
    grad_z = torch.zeros_like(x) if wanted[0] else None
    grad_weight = torch.empty_like(weight) if wanted[1] else None
    grad_bias = torch.empty_like(bias) if wanted[2] else None
    for tile, part, rows, columns, place in _bow_tiles(*inputs):
        loss += F.softplus(tile).sum() - tile[rows, columns].sum()
        if not any(wanted):
            continue
        error = tile.sigmoid_()
        error[rows, columns] -= 1.0
        if grad_z is not None:
            grad_z.addmm_(error, part)
        if grad_weight is not None:
            _product_into(grad_weight[place], error.t(), x)
        if grad_bias is not None:
            grad_bias[place] = error.sum(dim=0)
    return loss, [None if grad_z is None else grad_z.to(z.dtype), grad_weight, grad_bias]


def _bow_tiles(
    z: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, cu_seqlens: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, slice]]:
    """Tile by tile: logits (B, C), the head's part (C, Z), the cells of tokens that are present
    (rows, columns), each cell once, and the tile's place in the vocabulary."""
    (num_rows, _), vocab = z.shape, weight.shape[0]
    dtype = _compute_dtype(z, weight, bias)
    x = z.to(dtype)
    tokens = torch.arange(ids.numel())
    # A set of cells, ordered by token first.
    cells = torch.unique(ids * num_rows + sequence_of(tokens, cu_seqlens))
    present, rows = cells // max(num_rows, 1), cells % max(num_rows, 1)
    width = min(max(BOW_COLUMNS, BOW_CELLS // max(num_rows, 1)), vocab)
    bounds = tile_bounds(present, vocab, width)
    buffer = torch.empty(num_rows * width, dtype=dtype)
    for index, left in enumerate(range(0, vocab, width)):
        place = slice(left, min(left + width, vocab))
        part = weight[place].to(dtype)
        tile = buffer[: num_rows * part.shape[0]].view(num_rows, part.shape[0])
        torch.addmm(bias[place].to(dtype), x, part.t(), out=tile)
        own = slice(bounds[index], bounds[index + 1])
        yield tile, part, rows[own], present[own] - left, place


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b))
