"""The reconstruction loss on a CPU: plain PyTorch, a tile of the vocabulary at a time.

Legend: T packed positions, M valid target positions, D hidden, V vocabulary, R positions and
C columns of a tile of logits.

`reference.py` goes over all logits of a chunk once for each of its steps; whatever the size of the
chunk, either it misses the cache or its products have too few positions. Here the chunk is cut
along the vocabulary: a tile of logits is made, used and overwritten while it is in the cache, and
the products keep up to TILE_POSITIONS positions. For that a tile must need nothing from the others:
the loss is measured against the target's own logit, which is known beforehand (`triton_kernels.py`
has the formula).

Gradients are sums over tiles, in a fixed order: the same bits each time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cdpvae_kernels.common.matmul import accumulation_dtype
from cdpvae_kernels.common.tiles import tile_bounds
from cdpvae_kernels.linear_cross_entropy import reference
from cdpvae_kernels.linear_cross_entropy.interface import IGNORED, Losses, Options

# A tile of 16 MB of fp32: measured on two cores with 512 to 2,048 positions and 2,048 to 4,096
# columns.
TILE_POSITIONS, TILE_COLUMNS = 2048, 2048
# Fewer columns than this are no product worth starting: a smaller budget takes positions away
# instead.
MIN_COLUMNS = 256
# Where the sum of exponentials of a position is larger, it may have overflowed, or its products
# will: the target lies about 69 nats below the best token.
LARGEST_REST = 1e30


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    positions: Tensor | None,
    scale: Tensor,
    options: Options,
) -> Losses:
    """Compute what `reference.linear_cross_entropy` does, from the same arguments.

    The reference also does what is rare: a soft cap, a head that is trained, and positions so wrong
    that exponentials relative to the target overflow.
    """
    if options.softcap is not None or options.want_weight:
        return reference.linear_cross_entropy(hidden, weight, targets, positions, scale, options)
    if options.ignores:
        return _without_ignored(hidden, weight, targets, positions, scale, options)

    # Make room for the results and for one tile of logits.
    dtype, num_valid = accumulation_dtype(hidden.dtype), targets.numel()
    nll, lse = torch.empty(num_valid, dtype=dtype), torch.empty(num_valid, dtype=dtype)
    grad_positions = hidden.new_empty(num_valid, weight.shape[1]) if options.want_hidden else None
    chunk_positions, columns = _tile(dtype, num_valid, weight.shape[0], options.chunk_bytes)
    buffer = torch.empty(chunk_positions * columns, dtype=dtype)

    for start in range(0, num_valid, chunk_positions):
        # Sum over all other tokens, tile by tile, relative to the target's own logit.
        chunk = slice(start, min(start + chunk_positions, num_valid))
        index = torch.arange(chunk.start, chunk.stop) if positions is None else positions[chunk]
        x, y = hidden.index_select(0, index).to(dtype), targets[chunk]
        of_y = weight.index_select(0, y).to(dtype)
        target_logit = (x * of_y).sum(dim=1, keepdim=True)
        rest, product = _sums_over_others(
            x, weight, y, target_logit, buffer, columns, options.want_hidden
        )
        nll[chunk] = torch.log1p(rest)
        lse[chunk] = target_logit.squeeze(1) + nll[chunk]

        # Scale the summed products and add the target's own part of the gradient.
        if grad_positions is not None and product is not None:
            from_z_loss = 2.0 * options.z_loss * lse[chunk]
            per_position = scale / (1.0 + rest)
            product.mul_((per_position * (1.0 + from_z_loss)).unsqueeze(1))
            product.addcmul_(of_y, (per_position * (from_z_loss - rest)).unsqueeze(1))
            grad_positions[chunk] = product

        # Compute anew the positions whose sums may have overflowed. NaN compares false and is left
        # as it is: the run must see it.
        (overflowed,) = torch.nonzero(rest > LARGEST_REST, as_tuple=True)
        if overflowed.numel():
            redone = reference.linear_cross_entropy(
                hidden, weight, y[overflowed], index[overflowed], scale, options
            )
            places = chunk.start + overflowed
            nll[places], lse[places] = redone.nll, redone.lse
            if grad_positions is not None and redone.grad_positions is not None:
                grad_positions[places] = redone.grad_positions
    return Losses(nll, lse, grad_positions, None)


def _without_ignored(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    positions: Tensor | None,
    scale: Tensor,
    options: Options,
) -> Losses:
    """Compute the positions that count, with the bits they have alone; the others get zeros.

    Arguments as for `linear_cross_entropy`. The operator is called with data, whatever traced it,
    so that on a CPU the positions can be looked at.
    """
    kept = (targets != IGNORED).nonzero().squeeze(1)
    found = linear_cross_entropy(
        hidden,
        weight,
        targets.index_select(0, kept),
        kept if positions is None else positions.index_select(0, kept),
        scale,
        options._replace(ignores=False),
    )

    # Back to their places among all.
    def spread(values: Tensor) -> Tensor:
        shape = (targets.numel(), *values.shape[1:])
        return values.new_zeros(shape).index_copy_(0, kept, values)

    grad = found.grad_positions
    return Losses(
        spread(found.nll), spread(found.lse), None if grad is None else spread(grad), None
    )


def _tile(
    dtype: torch.dtype,
    num_valid: int,
    vocab: int,
    chunk_bytes: int | None,
) -> tuple[int, int]:
    """Return positions and columns of a tile within the budget, at least (1, MIN_COLUMNS).

    dtype: of the logits.
    num_valid: M, at most so many positions are in a tile.
    vocab: V, at most so many columns are in a tile.
    chunk_bytes: the budget; None for the measured sizes.
    """
    positions, columns = min(TILE_POSITIONS, max(num_valid, 1)), TILE_COLUMNS
    # A smaller budget takes columns away first, then positions.
    if chunk_bytes is not None:
        cells = chunk_bytes // dtype.itemsize
        columns = max(min(cells // positions, TILE_COLUMNS), MIN_COLUMNS)
        positions = max(min(cells // columns, positions), 1)
    return positions, min(columns, vocab)


def _sums_over_others(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    target_logit: Tensor,
    buffer: Tensor,
    columns: int,
    want_product: bool,
) -> tuple[Tensor, Tensor | None]:
    """Sum e_v (R,), and e_v W_v (R, D) if wanted, over all tokens v but the target.

    x (R, D): hidden states in the dtype of the sums.
    weight (V, D): the head.
    targets (R,): int64.
    target_logit (R, 1): e_v is exp(logit_v - target_logit).
    buffer (at least R * columns,): memory for one tile.
    columns: the width of a tile.
    want_product: whether to sum e_v W_v too.
    """
    # Sort the targets, so that each tile finds its own in one slice.
    rest = x.new_zeros(x.shape[0])
    product = torch.zeros_like(x) if want_product else None
    order = targets.argsort(stable=True)
    bounds = tile_bounds(targets[order], weight.shape[0], columns)

    # Use each tile up while it is in the cache; the targets' own cells count as 0.
    for tile_index, left in enumerate(range(0, weight.shape[0], columns)):
        part = weight[left : left + columns].to(x.dtype)
        tile = buffer[: x.shape[0] * part.shape[0]].view(x.shape[0], part.shape[0])
        torch.addmm(target_logit, x, part.t(), beta=-1.0, out=tile).exp_()
        own = order[bounds[tile_index] : bounds[tile_index + 1]]
        tile[own, targets[own] - left] = 0.0
        rest += tile.sum(dim=1)
        if product is not None:
            product.addmm_(tile, part)
    return rest, product
