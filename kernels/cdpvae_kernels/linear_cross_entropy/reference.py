"""The definition of the reconstruction loss in plain PyTorch."""

import torch
from torch import Tensor

from cdpvae_kernels.common.matmul import accumulate, accumulation_dtype, matmul, operand

# Logits held at a time. On a CPU a chunk should stay in the last-level cache; a GPU needs some
# thousand rows to fill its multiprocessors.
CHUNK_BYTES_CPU = 8 << 20
CHUNK_BYTES_GPU = 512 << 20
MIN_CHUNK_ROWS = 64


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
    """See `linear_cross_entropy.linear_cross_entropy`; every target is valid, scale is 1 / divisor.

    The gradients are computed beside the loss, while a chunk's probabilities are at hand.
    Returns (nll (M,), lse (M,), d loss / d hidden[rows] (M, D) or None, d loss / d weight or None).
    """
    num_valid, dtype = targets.numel(), accumulation_dtype(hidden.dtype)
    head = operand(weight)
    grad_rows = hidden.new_empty(num_valid, weight.shape[1]) if want_hidden else None
    grad_weight = weight.new_zeros(weight.shape, dtype=dtype) if want_weight else None
    nll, lse = (torch.empty(num_valid, dtype=dtype, device=hidden.device) for _ in "nl")

    chunk_rows = _chunk_rows(weight, dtype, chunk_bytes, softcap)
    buffer = torch.empty(
        min(chunk_rows, num_valid), weight.shape[0], dtype=dtype, device=hidden.device
    )
    for start in range(0, num_valid, chunk_rows):
        chunk = slice(start, min(start + chunk_rows, num_valid))
        x = hidden[chunk] if rows is None else hidden.index_select(0, rows[chunk])
        x = operand(x)
        logits = matmul(x, head.t(), out=buffer[: x.shape[0]])
        nll[chunk], lse[chunk], error = _row_losses(
            logits, targets[chunk], z_loss, softcap, want_hidden or want_weight
        )
        if error is None:
            continue
        error = error.to(head.dtype)
        if want_hidden:
            # The scale goes on here and not on `error`: D columns instead of V.
            grad_rows[chunk] = matmul(error, head).mul_(scale)
        if want_weight:
            accumulate(grad_weight, error.t(), x)
    if want_weight:
        grad_weight = grad_weight.mul_(scale).to(weight.dtype)
    return nll, lse, grad_rows, grad_weight


def scatter_rows(grad_rows: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """(M, D) -> (num_rows, D): row i is added to row rows[i]; rows may repeat, the rest is 0."""
    grad = grad_rows.new_zeros(num_rows, grad_rows.shape[1])
    if grad.device.type == "cpu":
        return grad.index_add_(0, rows, grad_rows)
    # Sorts the indices, where index_add_ on a GPU would add in any order.
    return grad.index_put_((rows,), grad_rows, accumulate=True)


def _chunk_rows(
    weight: Tensor, dtype: torch.dtype, chunk_bytes: int | None, softcap: float | None
) -> int:
    # A softcap needs its tanh again for the gradient: a second buffer as large as the logits.
    row_bytes = weight.shape[0] * dtype.itemsize * (1 if softcap is None else 2)
    if chunk_bytes is not None:
        return max(chunk_bytes // row_bytes, 1)
    budget = CHUNK_BYTES_CPU if weight.device.type == "cpu" else CHUNK_BYTES_GPU
    return max(budget // row_bytes, MIN_CHUNK_ROWS)


def _row_losses(
    logits: Tensor, targets: Tensor, z_loss: float, softcap: float | None, want_error: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """nll (M,), lse (M,) and d(nll + z_loss * lse^2)/d logits, the latter in place of the logits.

    The target is kept out of the sum of exponentials: with `rest` the sum over the other tokens,
    1 - p(target) is rest / (rest + e_target) without cancellation, and a token that is certain
    keeps a loss and a gradient with full relative precision.
    """
    capped_tanh = None
    if softcap is not None:
        logits.div_(softcap).tanh_()
        capped_tanh = logits.clone() if want_error else None
        logits.mul_(softcap)
    column = targets.unsqueeze(1)
    peak = logits.amax(dim=1, keepdim=True)
    target_logit = logits.gather(1, column)
    shortfall = peak - target_logit
    exps = logits.sub_(peak).exp_()
    target_exp = exps.gather(1, column)
    rest = exps.scatter_(1, column, 0.0).sum(dim=1, keepdim=True)
    # If the target is the peak, target_exp is 1 and this is log1p(rest); else rest is at least 1.
    nll = shortfall + torch.log1p(rest + (target_exp - 1.0))
    lse = target_logit + nll
    if not want_error:
        return nll.squeeze(1), lse.squeeze(1), None

    total = rest + target_exp
    from_z_loss = 2.0 * z_loss * lse
    error = exps.mul_((1.0 + from_z_loss) / total)
    error.scatter_(1, column, (from_z_loss * target_exp - rest) / total)
    if capped_tanh is not None:
        error.mul_(capped_tanh.square_().neg_().add_(1.0))
    return nll.squeeze(1), lse.squeeze(1), error
