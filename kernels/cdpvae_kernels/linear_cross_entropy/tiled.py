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

import torch
from torch import Tensor

from cdpvae_kernels.common.matmul import accumulation_dtype
from cdpvae_kernels.common.tiles import tile_bounds
from cdpvae_kernels.linear_cross_entropy import reference

# A tile of 16 MB of fp32: measured on two cores with 512 to 2,048 rows and 2,048 to 4,096 columns.
ROWS, COLUMNS = 2048, 2048
# Fewer columns than this are no product worth starting: a smaller budget takes rows away instead.
MIN_COLUMNS = 256
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
    bounds = tile_bounds(targets[order], weight.shape[0], columns)
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
