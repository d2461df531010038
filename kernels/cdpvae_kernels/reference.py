"""The definitions of all operations in plain PyTorch: the CPU path and the oracle of the kernels.

Shapes: `B` rows or sequences, `T` packed tokens, `N` target positions, `M` valid target positions,
`D` hidden, `V` vocabulary, `Z` latent, `P` prompts.

Arguments have been checked by the public functions of the same names. Reductions are fp32, or fp64
for fp64 inputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cdpvae_kernels import philox
from cdpvae_kernels.matmul import accumulate, accumulation_dtype, matmul, operand

# Logits held at a time. On a CPU a chunk should stay in the last-level cache; a GPU needs some
# thousand rows to fill its multiprocessors.
CHUNK_BYTES_CPU = 8 << 20
CHUNK_BYTES_GPU = 512 << 20
MIN_CHUNK_ROWS = 64


def sequence_of(positions: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The sequence, (N,) int64, to which each packed position (N,) int64 belongs."""
    return torch.searchsorted(cu_seqlens[1:].to(torch.int64), positions, right=True)


def word_dropout(
    ids: Tensor,
    cu_seqlens: Tensor,
    sample_index: Tensor,
    threshold: int,
    fill_id: int,
    seed: int,
    epoch: int,
) -> Tensor:
    """See `word_dropout.word_dropout`; threshold is floor(rate * 2^32)."""
    tokens = torch.arange(ids.numel(), device=ids.device)
    sequence = sequence_of(tokens, cu_seqlens)
    position = tokens - cu_seqlens.to(torch.int64)[sequence]
    word = philox.bits(
        seed, philox.Stream.WORD_DROPOUT, sample_index[sequence], epoch, position, impl="reference"
    )
    return ids.masked_fill((word < threshold) & (position > 0), fill_id)


def prefixed_rows(rows: Tensor, cu_seqlens: Tensor, num_prompts: int) -> Tensor:
    """See `prefixed_embedding.prefixed_rows`."""
    return rows + num_prompts * (sequence_of(rows, cu_seqlens) + 1)


def prefixed_embedding(
    embedding: Tensor, ids: Tensor, cu_seqlens: Tensor, prompts: Tensor
) -> tuple[Tensor, Tensor]:
    """See `prefixed_embedding.prefixed_embedding`."""
    batch, num_prompts, width = prompts.shape
    sequences = torch.arange(batch + 1, device=cu_seqlens.device, dtype=torch.int32)
    packed_cu = cu_seqlens + num_prompts * sequences
    tokens = torch.arange(ids.numel(), device=ids.device)
    token_rows = prefixed_rows(tokens, cu_seqlens, num_prompts)
    offsets = torch.arange(num_prompts, device=prompts.device)
    prompt_rows = (packed_cu[:-1, None].to(torch.int64) + offsets).flatten()
    packed = prompts.new_empty(ids.numel() + batch * num_prompts, width)
    # Prompts last: under a frozen embedding their gradient is a gather and copies nothing else.
    packed.index_copy_(0, token_rows, F.embedding(ids, embedding))
    packed.index_copy_(0, prompt_rows, prompts.reshape(batch * num_prompts, width))
    return packed, packed_cu


def bow_bce(
    z: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, cu_seqlens: Tensor, reduction: str
) -> Tensor:
    """See `bow_bce.bow_bce`."""
    logits_BV = _bow_logits(z, weight, bias)
    present_BV = torch.zeros_like(logits_BV)
    present_BV.view(-1).index_fill_(0, _flat_cells(ids, cu_seqlens, weight.shape[0]), 1.0)
    total = F.binary_cross_entropy_with_logits(logits_BV, present_BV, reduction="sum")
    return total / max(logits_BV.numel(), 1) if reduction == "mean" else total


def bow_categorical(
    z: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """See `bow_bce.bow_categorical`."""
    log_p_BV = _bow_logits(z, weight, bias).log_softmax(dim=-1)
    counts_BV = torch.zeros_like(log_p_BV)
    cells = _flat_cells(ids, cu_seqlens, weight.shape[0])
    counts_BV.view(-1).index_add_(0, cells, counts_BV.new_ones(ids.numel()))
    lengths_B = cu_seqlens.diff().clamp(min=1).to(log_p_BV.dtype)
    per_row_B = -(counts_BV * log_p_BV).sum(dim=-1) / lengths_B
    return per_row_B.sum() / max(z.shape[0], 1)


def _bow_logits(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    doubles = torch.float64 in (z.dtype, weight.dtype, bias.dtype)
    dtype = torch.float64 if doubles else torch.float32
    return F.linear(z.to(dtype), weight.to(dtype), bias.to(dtype))


def _flat_cells(ids: Tensor, cu_seqlens: Tensor, vocab: int) -> Tensor:
    tokens = torch.arange(ids.numel(), device=ids.device)
    return sequence_of(tokens, cu_seqlens) * vocab + ids


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
