"""The two vocabulary-wide operations on a CPU: plain PyTorch, a tile of the vocabulary at a time.

Legend: B rows, T packed tokens, M valid target positions, D hidden, V vocabulary, Z latent,
R rows and C columns of a tile of logits.

`reference.py` goes over all logits of a chunk once for each of its steps; whatever the size of the
chunk, either it misses the cache or its products have too few rows. Here the chunk is cut along the
vocabulary: a tile of logits is made, used and forgotten while it is in the cache, and the products
keep up to ROWS rows. For that a tile must need nothing from the others: the reconstruction loss is
measured against the target's own logit, which is known beforehand (see
`triton_kernels/linear_cross_entropy.py`), and BCE treats every token on its own.

Gradients are sums over tiles, in a fixed order: the same bits each time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from cdpvae_kernels import reference
from cdpvae_kernels.matmul import accumulation_dtype

# A tile of 16 MB of fp32: measured on two cores with 512 to 2,048 rows and 2,048 to 4,096 columns.
ROWS, COLUMNS = 2048, 2048
# Fewer columns than this are no product worth starting: a smaller budget takes rows away instead.
MIN_COLUMNS = 256
# Of the bag of words: few rows take more columns, up to 1 MB of fp32.
BOW_COLUMNS, BOW_CELLS = 4096, 2**18
# The sum of exponentials of a row beyond this may have overflowed, or its products will: the
# target lies about 69 nats below the best token.
LARGEST_REST = 1e30


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor | None,
    scale: Tensor,
    chunk_bytes: int | None,
    z_loss: float,
    softcap: float | None,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """As `reference.linear_cross_entropy`, which also does what is rare: a soft cap, a head that
    is trained, and rows so wrong that exponentials relative to the target overflow."""
    settings = (scale, chunk_bytes, z_loss, softcap, want_hidden, want_weight)
    if softcap is not None or want_weight:
        return reference.linear_cross_entropy(hidden, weight, targets, rows, *settings)
    dtype, num_valid = accumulation_dtype(hidden.dtype), targets.numel()
    nll, lse = (torch.empty(num_valid, dtype=dtype) for _ in "nl")
    grad_rows = hidden.new_empty(num_valid, weight.shape[1]) if want_hidden else None
    chunk_rows, columns = _tile(dtype, num_valid, weight.shape[0], chunk_bytes)
    buffer = torch.empty(chunk_rows * columns, dtype=dtype)
    for start in range(0, num_valid, chunk_rows):
        chunk = slice(start, min(start + chunk_rows, num_valid))
        index = torch.arange(chunk.start, chunk.stop) if rows is None else rows[chunk]
        x, y = hidden.index_select(0, index).to(dtype), targets[chunk]
        of_y = weight.index_select(0, y).to(dtype)
        target_logit = (x * of_y).sum(dim=1, keepdim=True)
        rest, product = _others(x, weight, y, target_logit, buffer, columns, want_hidden)
        nll[chunk] = torch.log1p(rest)
        lse[chunk] = target_logit.squeeze(1) + nll[chunk]
        if want_hidden:
            from_z_loss = 2.0 * z_loss * lse[chunk]
            per_row = scale / (1.0 + rest)
            product.mul_((per_row * (1.0 + from_z_loss)).unsqueeze(1))
            product.addcmul_(of_y, (per_row * (from_z_loss - rest)).unsqueeze(1))
            grad_rows[chunk] = product
        # NaN compares false and is left as it is: the run must see it.
        (overflowed,) = torch.nonzero(rest > LARGEST_REST, as_tuple=True)
        if overflowed.numel():
            redone = reference.linear_cross_entropy(
                hidden, weight, y[overflowed], index[overflowed], *settings
            )
            for whole, part in zip((nll, lse, grad_rows), redone, strict=False):
                if whole is not None:
                    whole[chunk.start + overflowed] = part
    return nll, lse, grad_rows, None


def _tile(
    dtype: torch.dtype, num_valid: int, vocab: int, chunk_bytes: int | None
) -> tuple[int, int]:
    """Rows and columns of a tile within the budget, one row of MIN_COLUMNS at least."""
    rows, columns = min(ROWS, max(num_valid, 1)), COLUMNS
    if chunk_bytes is not None:
        cells = chunk_bytes // dtype.itemsize
        columns = max(min(cells // rows, COLUMNS), MIN_COLUMNS)
        rows = max(min(cells // columns, rows), 1)
    return rows, min(columns, vocab)


def _others(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    target_logit: Tensor,
    buffer: Tensor,
    columns: int,
    want_product: bool,
) -> tuple[Tensor, Tensor | None]:
    """Over all tokens v but the target: sum of e_v (R,), and sum of e_v W_v (R, D) if wanted."""
    rest = x.new_zeros(x.shape[0])
    product = torch.zeros_like(x) if want_product else None
    order = targets.argsort(stable=True)
    bounds = _bounds(targets[order], weight.shape[0], columns)
    for tile_index, left in enumerate(range(0, weight.shape[0], columns)):
        part = weight[left : left + columns].to(x.dtype)
        tile = buffer[: x.shape[0] * part.shape[0]].view(x.shape[0], part.shape[0])
        torch.addmm(target_logit, x, part.t(), beta=-1.0, out=tile).exp_()
        own = order[bounds[tile_index] : bounds[tile_index + 1]]
        tile[own, targets[own] - left] = 0.0
        rest += tile.sum(dim=1)
        if want_product:
            product.addmm_(tile, part)
    return rest, product


def _bounds(ascending: Tensor, vocab: int, columns: int) -> list[int]:
    """Where each tile's tokens start in an ascending list of token ids, and where the last ends."""
    edges = torch.arange(0, vocab + columns, columns)
    return torch.searchsorted(ascending, edges).tolist()


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
    cells = torch.unique(ids * num_rows + reference.sequence_of(tokens, cu_seqlens))
    present, rows = cells // max(num_rows, 1), cells % max(num_rows, 1)
    width = min(max(BOW_COLUMNS, BOW_CELLS // max(num_rows, 1)), vocab)
    bounds = _bounds(present, vocab, width)
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
