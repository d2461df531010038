"""Cross-entropy of a linear head on the GPU: what launches `triton_kernels`, chunk by chunk."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from cdpvae_kernels.common.launch_configs import LaunchConfig
from cdpvae_kernels.common.matmul import accumulate, accumulation_dtype, matmul, operand
from cdpvae_kernels.common.runtime import configuration
from cdpvae_kernels.linear_cross_entropy.triton_kernels import (
    error_kernel,
    finish_kernel,
    rows_kernel,
)

OP = "linear_cross_entropy"
# Logits in fp32 and e in the operands' dtype held at a time, and the fewest rows that keep the
# products bound by arithmetic: below, reading the head for every chunk costs more than using it.
CHUNK_BYTES = 800 << 20
MIN_CHUNK_ROWS = 1024
TILE_ROWS = 128


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
    configs: dict[str, LaunchConfig] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """As `reference.linear_cross_entropy`. configs: another table's entries, for tests and tuning.

    Nothing here waits for the device.
    """
    num_valid, (vocab, width) = targets.numel(), weight.shape
    head, dtype = operand(weight).contiguous(), accumulation_dtype(hidden.dtype)
    exps_dtype = head.dtype if head.device.type == "cuda" else hidden.dtype
    fp32 = {"dtype": dtype, "device": hidden.device}
    scale = scale.to(**fp32)
    nll, lse, others, target_coefficient = (torch.empty(num_valid, **fp32) for _ in range(4))
    grad_rows = hidden.new_empty(num_valid, width) if want_hidden else None
    grad_weight = torch.zeros(vocab, width, **fp32) if want_weight else None
    want_exps = want_hidden or want_weight

    chunk_rows = min(_chunk_rows(vocab, exps_dtype, chunk_bytes), max(num_valid, 1))
    logits = torch.empty(chunk_rows, vocab, **fp32)
    exps = torch.empty(
        chunk_rows if want_exps else 0, vocab, dtype=exps_dtype, device=hidden.device
    )
    for start in range(0, num_valid, chunk_rows):
        chunk = slice(start, min(start + chunk_rows, num_valid))
        size = chunk.stop - chunk.start
        x = hidden[chunk] if rows is None else hidden.index_select(0, rows[chunk])
        x = operand(x)
        matmul(x, head.t(), out=logits[:size])
        per_row = (targets[chunk], others[chunk], target_coefficient[chunk])
        launch_rows(logits[:size], exps, per_row, nll[chunk], lse[chunk], z_loss, softcap, configs)
        if want_hidden:
            product = matmul(operand(exps[:size]), head)
            launch_finish(product, head, per_row, scale, grad_rows[chunk], configs)
        if want_weight:
            launch_error(exps[:size], per_row, configs)
            accumulate(grad_weight, operand(exps[:size]).t(), x)
    if want_weight:
        grad_weight = grad_weight.mul_(scale).to(weight.dtype)
    return nll, lse, grad_rows, grad_weight


def _chunk_rows(vocab: int, exps_dtype: torch.dtype, chunk_bytes: int | None) -> int:
    row_bytes = vocab * (torch.float32.itemsize + exps_dtype.itemsize)
    if chunk_bytes is not None:
        return max(chunk_bytes // row_bytes, 1)
    # Whole tiles of the products: 1,089 rows would leave most of a tile's rows idle.
    return max(CHUNK_BYTES // row_bytes // TILE_ROWS * TILE_ROWS, MIN_CHUNK_ROWS)


def launch_rows(logits, exps, per_row, nll, lse, z_loss, softcap, configs) -> None:
    targets, others, target_coefficient = per_row
    rows, vocab = logits.shape
    rows_kernel[(rows,)](
        logits,
        exps,
        targets,
        nll,
        lse,
        others,
        target_coefficient,
        vocab,
        float(z_loss),
        1.0 if softcap is None else float(softcap),
        HAS_SOFTCAP=softcap is not None,
        STORE_EXPS=exps.numel() > 0,
        NARROW=exps.dtype == torch.float16,
        **configuration(f"{OP}.rows", logits.device, configs, BLOCK_V=vocab),
    )


def launch_error(exps, per_row, configs) -> None:
    rows, vocab = exps.shape
    config = configuration(f"{OP}.error", exps.device, configs, BLOCK_V=vocab)
    grid = (rows, triton.cdiv(vocab, config["BLOCK_V"]))
    error_kernel[grid](exps, *per_row, vocab, **config)


def launch_finish(product, head, per_row, scale, grad, configs) -> None:
    rows, width = product.shape
    config = configuration(f"{OP}.finish", product.device, configs, BLOCK_D=width)
    grid = (rows, triton.cdiv(width, config["BLOCK_D"]))
    finish_kernel[grid](product, head, *per_row, scale, grad, width, **config)
