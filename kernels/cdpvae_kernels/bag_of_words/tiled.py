"""The bag-of-words BCE on a CPU: plain PyTorch, a tile of the vocabulary at a time.

Shapes: `B` rows, `Z` latent, `V` vocabulary, `T` packed tokens, `C` columns of a tile of logits.

The BCE treats every token on its own, so a tile of logits is made, used and overwritten while it is
in the cache. Gradients are sums over tiles, in a fixed order: the same bits each time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cdpvae_kernels.bag_of_words.arguments import IGNORED
from cdpvae_kernels.common.autograd import OperatorContext
from cdpvae_kernels.common.packing import sequence_of
from cdpvae_kernels.common.tiles import tile_bounds

# Few rows take more columns, up to 1 MB of fp32.
BOW_COLUMNS, BOW_CELLS = 4096, 2**18


class _Operands(NamedTuple):
    """The arguments of the loss; `wanted` says whose gradients to compute, in this order."""

    z: Tensor
    weight: Tensor
    bias: Tensor
    ids: Tensor
    cu_seqlens: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of logits and sums: fp64 if any operand is, else fp32."""
        operands = (self.z.dtype, self.weight.dtype, self.bias.dtype)
        return torch.float64 if torch.float64 in operands else torch.float32


class _Gradients(NamedTuple):
    z: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class _Tile(NamedTuple):
    """One tile of logits and what belongs to it."""

    # (B, C).
    logits: Tensor
    # (C, Z), in the dtype of the logits.
    weight: Tensor
    # Row and column of each cell whose token is present, every cell once.
    rows: Tensor
    columns: Tensor
    # The tile's columns in the vocabulary.
    place: slice


def bow_bce(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    ids: Tensor,
    cu_seqlens: Tensor,
) -> Tensor:
    """Compute the BCE, summed over rows and vocabulary; differentiable once.

    z (B, Z), weight (V, Z), bias (V,): float.
    ids (T,): int64 or int32.
    cu_seqlens (B+1,): int32.
    """
    # Gradients are made in the forward pass, so only those that will be asked for.
    wanted = tuple(torch.is_grad_enabled() and t.requires_grad for t in (z, weight, bias))
    return _BowBCE.apply(z, weight, bias, ids, cu_seqlens, wanted)


class _Context(OperatorContext, Protocol):
    wanted: tuple[bool, ...]
    gradients: _Gradients | None


class _BowBCE(torch.autograd.Function):
    """The gradients are made beside the loss, tile by tile, and scaled in place in backward.

    A graph that is kept may run its backward again: then they are made anew.
    """

    @staticmethod
    def forward(
        ctx: _Context,
        z: Tensor,
        weight: Tensor,
        bias: Tensor,
        ids: Tensor,
        cu_seqlens: Tensor,
        wanted: tuple[bool, ...],
    ) -> Tensor:
        operands = _Operands(z, weight, bias, ids, cu_seqlens)
        ctx.save_for_backward(*operands)
        ctx.wanted = wanted
        loss, ctx.gradients = _loss_and_gradients(operands, wanted)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: _Context, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        # A second run through a kept graph: the first one has scaled the gradients in place.
        if gradients is None:
            _, gradients = _loss_and_gradients(_Operands(*ctx.saved_tensors), ctx.wanted)
        scaled = [None if g is None else g.mul_(upstream) for g in gradients]
        return *scaled, None, None, None


def _loss_and_gradients(operands: _Operands, wanted: tuple[bool, ...]) -> tuple[Tensor, _Gradients]:
    """Compute the loss, and its gradients of z, weight and bias where wanted."""
    z, weight, bias, *_ = operands
    x = z.to(operands.dtype)
    loss = x.new_zeros(())
    grad_z = torch.zeros_like(x) if wanted[0] else None
    grad_weight = torch.empty_like(weight) if wanted[1] else None
    grad_bias = torch.empty_like(bias) if wanted[2] else None
    for logits, part, rows, columns, place in _tiles(operands):
        # The loss of every token as if it were absent, less the logits of those that are present.
        loss += F.softplus(logits).sum() - logits[rows, columns].sum()
        if not any(wanted):
            continue

        # d loss / d logits in the logits' place, and what it gives for each operand.
        error = logits.sigmoid_()
        error[rows, columns] -= 1.0
        if grad_z is not None:
            grad_z.addmm_(error, part)
        if grad_weight is not None:
            _product_into(grad_weight[place], error.t(), x)
        if grad_bias is not None:
            grad_bias[place] = error.sum(dim=0)
    if grad_z is not None:
        grad_z = grad_z.to(z.dtype)
    return loss, _Gradients(grad_z, grad_weight, grad_bias)


def _tiles(operands: _Operands) -> Iterator[_Tile]:
    """Compute the logits tile by tile; the next tile overwrites the last one's."""
    # A set of cells, ordered by token first, so that each tile finds its own in one slice.
    z, weight, bias, ids, cu_seqlens = operands
    (num_rows, _), vocab = z.shape, weight.shape[0]
    dtype = operands.dtype
    x = z.to(dtype)
    tokens = torch.arange(ids.numel())
    cells = ids * num_rows + sequence_of(tokens, cu_seqlens)
    cells = torch.unique(cells[ids != IGNORED])
    present, rows = cells // max(num_rows, 1), cells % max(num_rows, 1)

    # The fewer the rows, the wider a tile: its products should not be too small.
    width = min(max(BOW_COLUMNS, BOW_CELLS // max(num_rows, 1)), vocab)
    bounds = tile_bounds(present, vocab, width)
    buffer = torch.empty(num_rows * width, dtype=dtype)
    for index, left in enumerate(range(0, vocab, width)):
        place = slice(left, min(left + width, vocab))
        part = weight[place].to(dtype)
        logits = buffer[: num_rows * part.shape[0]].view(num_rows, part.shape[0])
        torch.addmm(bias[place].to(dtype), x, part.t(), out=logits)
        own = slice(bounds[index], bounds[index + 1])
        yield _Tile(logits, part, rows[own], present[own] - left, place)


def _product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Write a @ b to `out`, whose dtype may be another."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b))
