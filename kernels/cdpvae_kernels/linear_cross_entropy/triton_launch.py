"""Cross-entropy of a linear head on the GPU: what launches `triton_kernels`, chunk by chunk.

Legend: M valid target positions, C positions of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from cdpvae_kernels.common.launch_configs import LaunchConfig
from cdpvae_kernels.common.matmul import accumulate, accumulation_dtype, matmul, operand
from cdpvae_kernels.common.runtime import configuration
from cdpvae_kernels.linear_cross_entropy.interface import IGNORED, Losses, Options
from cdpvae_kernels.linear_cross_entropy.triton_kernels import (
    error_kernel,
    finish_kernel,
    rows_kernel,
)

OP = "linear_cross_entropy"
# Logits in fp32 and e in the operands' dtype held at a time, and the fewest positions that keep the
# products bound by arithmetic: below, reading the head for every chunk costs more than using it.
CHUNK_BYTES = 800 << 20
MIN_CHUNK_POSITIONS = 1024
TILE_POSITIONS = 128


class Coefficients(NamedTuple):
    """What the gradient of each position needs beside its e; the kernels take it apart.

    targets (C,): int64.
    others (C,): fp32, the factor of e W.
    target (C,): fp32, the factor of the target's own row of the head.
    """

    targets: Tensor
    others: Tensor
    target: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    positions: Tensor | None,
    scale: Tensor,
    options: Options,
    configs: dict[str, LaunchConfig] | None = None,
) -> Losses:
    """Compute what `reference.linear_cross_entropy` does, from the same arguments.

    Nothing here waits for the device.

    configs: entries that count before those of the table, for tests and tuning.
    """
    # Make room for the results.
    num_valid, (vocab, width), device = targets.numel(), weight.shape, hidden.device
    # The kernels read both with a stride of 1, whatever views the caller handed over.
    head, targets = operand(weight).contiguous(), targets.contiguous()
    dtype = accumulation_dtype(hidden.dtype)
    exps_dtype = head.dtype if head.device.type == "cuda" else hidden.dtype
    scale = scale.to(device=device, dtype=dtype)
    nll, lse, others, target = (
        torch.empty(num_valid, dtype=dtype, device=device) for _ in range(4)
    )
    grad_positions = hidden.new_empty(num_valid, width) if options.want_hidden else None
    grad_weight = (
        torch.zeros(vocab, width, dtype=dtype, device=device) if options.want_weight else None
    )

    # Make room for the logits of one chunk and, where there is a gradient, for its e.
    want_exps = options.want_hidden or options.want_weight
    # A chunk is as large as the budget allows: each one reads the head twice.
    chunk_size = min(_chunk_positions(vocab, exps_dtype, options.chunk_bytes), max(num_valid, 1))
    logits = torch.empty(chunk_size, vocab, dtype=dtype, device=device)
    exps = torch.empty(chunk_size if want_exps else 0, vocab, dtype=exps_dtype, device=device)

    for start in range(0, num_valid, chunk_size):
        # First product, and the one pass over its logits.
        chunk = slice(start, min(start + chunk_size, num_valid))
        size = chunk.stop - chunk.start
        x = hidden[chunk] if positions is None else hidden.index_select(0, positions[chunk])
        x = operand(x)
        if options.ignores and options.want_weight:
            # Their e is 0, but 0 x NaN would still reach the weight's gradient.
            x = x.masked_fill((targets[chunk] == IGNORED).unsqueeze(1), 0.0)
        matmul(x, head.t(), out=logits[:size])
        of_chunk = Coefficients(targets[chunk], others[chunk], target[chunk])
        launch_rows(logits[:size], exps, of_chunk, nll[chunk], lse[chunk], options, configs)

        # Second product, once for each gradient that is wanted.
        if grad_positions is not None:
            product = matmul(operand(exps[:size]), head)
            launch_finish(product, head, of_chunk, scale, grad_positions[chunk], configs)
        if grad_weight is not None:
            launch_error(exps[:size], of_chunk, configs)
            accumulate(grad_weight, operand(exps[:size]).t(), x)

    if grad_weight is not None:
        grad_weight = grad_weight.mul_(scale).to(weight.dtype)
    return Losses(nll, lse, grad_positions, grad_weight)


def _chunk_positions(vocab: int, exps_dtype: torch.dtype, chunk_bytes: int | None) -> int:
    """Return how many positions' logits and e fit into the budget, at least one."""
    position_bytes = vocab * (torch.float32.itemsize + exps_dtype.itemsize)
    if chunk_bytes is not None:
        return max(chunk_bytes // position_bytes, 1)
    # Whole tiles of the products: 1,089 positions would leave most of a tile idle.
    tiles = CHUNK_BYTES // position_bytes // TILE_POSITIONS
    return max(tiles * TILE_POSITIONS, MIN_CHUNK_POSITIONS)


def launch_rows(
    logits: Tensor,
    exps: Tensor,
    coefficients: Coefficients,
    nll: Tensor,
    lse: Tensor,
    options: Options,
    configs: dict[str, LaunchConfig] | None,
) -> None:
    """Turn the logits of a chunk into its e, losses and coefficients.

    logits (C, V): fp32, read.
    exps (C, V) or (0, V): written, in the operands' dtype; empty where no gradient is wanted.
    coefficients: the targets are read, the rest is written where a gradient is wanted.
    nll (C,): fp32, written.
    lse (C,): fp32, written.
    options: z_loss and softcap count.
    configs: entries that count before those of the table.
    """
    rows, vocab = logits.shape
    rows_kernel[(rows,)](
        logits,
        exps,
        coefficients.targets,
        nll,
        lse,
        coefficients.others,
        coefficients.target,
        vocab,
        float(options.z_loss),
        1.0 if options.softcap is None else float(options.softcap),
        HAS_SOFTCAP=options.softcap is not None,
        IGNORES=options.ignores,
        STORE_EXPS=exps.numel() > 0,
        NARROW=exps.dtype == torch.float16,
        **configuration(f"{OP}.rows", logits.device, configs, BLOCK_V=vocab),
    )


def launch_error(
    exps: Tensor, coefficients: Coefficients, configs: dict[str, LaunchConfig] | None
) -> None:
    """Turn e (C, V) into d loss / d logits, in place."""
    rows, vocab = exps.shape
    config = configuration(f"{OP}.error", exps.device, configs, BLOCK_V=vocab)
    grid = (rows, triton.cdiv(vocab, config["BLOCK_V"]))
    error_kernel[grid](exps, *coefficients, vocab, **config)


def launch_finish(
    product: Tensor,
    head: Tensor,
    coefficients: Coefficients,
    scale: Tensor,
    grad: Tensor,
    configs: dict[str, LaunchConfig] | None,
) -> None:
    """Turn the product e W of a chunk into its gradient.

    product (C, D): fp32, read.
    head (V, D): read at the targets.
    coefficients: read.
    scale (): fp32, multiplies the result.
    grad (C, D): written.
    configs: entries that count before those of the table.
    """
    rows, width = product.shape
    config = configuration(f"{OP}.finish", product.device, configs, BLOCK_D=width)
    grid = (rows, triton.cdiv(width, config["BLOCK_D"]))
    finish_kernel[grid](product, head, *coefficients, scale, grad, width, **config)
