"""The definition of the reconstruction loss in plain PyTorch: the oracle of the other two.

Shapes: `T` packed positions, `M` valid target positions, `D` hidden, `V` vocabulary.
"""

import torch
from torch import Tensor

from cdpvae_kernels.common.matmul import accumulate, accumulation_dtype, matmul, operand
from cdpvae_kernels.linear_cross_entropy.interface import IGNORED, Losses, Options

# Logits held at a time. On a CPU a chunk should stay in the last-level cache; a GPU needs some
# thousand positions to fill its multiprocessors.
CHUNK_BYTES_CPU = 8 << 20
CHUNK_BYTES_GPU = 512 << 20
MIN_CHUNK_POSITIONS = 64


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    positions: Tensor | None,
    scale: Tensor,
    options: Options,
) -> Losses:
    """Compute the losses of all positions, and the wanted gradients, a chunk at a time.

    The gradients are computed beside the loss, while a chunk's probabilities are at hand.

    hidden (T, D), weight (V, D): as the public function takes them.
    targets (M,): valid, or IGNORED where the options say that some are.
    positions (M,): where in `hidden` each target is predicted; None for the first M positions.
    scale (): 1 / divisor.
    options: see `Options`.
    """
    # Make room for the results and for the logits of one chunk.
    num_valid, dtype = targets.numel(), accumulation_dtype(hidden.dtype)
    head = operand(weight)
    grad_positions = hidden.new_empty(num_valid, weight.shape[1]) if options.want_hidden else None
    grad_weight = weight.new_zeros(weight.shape, dtype=dtype) if options.want_weight else None
    nll = torch.empty(num_valid, dtype=dtype, device=hidden.device)
    lse = torch.empty_like(nll)
    chunk_positions = _chunk_positions(weight, dtype, options)
    buffer = torch.empty(
        min(chunk_positions, num_valid), weight.shape[0], dtype=dtype, device=hidden.device
    )

    for start in range(0, num_valid, chunk_positions):
        # Multiply the chunk with the head and turn its logits into losses and errors.
        chunk = slice(start, min(start + chunk_positions, num_valid))
        x = hidden[chunk] if positions is None else hidden.index_select(0, positions[chunk])
        x = operand(x)
        of_chunk, ignored = targets[chunk], None
        if options.ignores:
            # Zeros and any token stand in, whatever was there; what comes of them is overwritten.
            ignored = of_chunk == IGNORED
            of_chunk = of_chunk.masked_fill(ignored, 0)
            x = x.masked_fill(ignored.unsqueeze(1), 0.0)
        logits = matmul(x, head.t(), out=buffer[: x.shape[0]])
        nll[chunk], lse[chunk], error = _losses_of_chunk(logits, of_chunk, options)
        if ignored is not None:
            nll[chunk].masked_fill_(ignored, 0.0)
            lse[chunk].masked_fill_(ignored, 0.0)
            error = None if error is None else error.masked_fill_(ignored.unsqueeze(1), 0.0)
        if error is None:
            continue

        # Turn the errors into gradients before the next chunk overwrites them.
        error = error.to(head.dtype)
        if grad_positions is not None:
            # The scale goes on here and not on `error`: D columns instead of V.
            grad_positions[chunk] = matmul(error, head).mul_(scale)
        if grad_weight is not None:
            accumulate(grad_weight, error.t(), x)

    if grad_weight is not None:
        grad_weight = grad_weight.mul_(scale).to(weight.dtype)
    return Losses(nll, lse, grad_positions, grad_weight)


def scatter_to_positions(gradients: Tensor, positions: Tensor, num_positions: int) -> Tensor:
    """Add gradient i of (M, D) to place positions[i] of a zero tensor (num_positions, D).

    Positions may repeat.
    """
    grad = gradients.new_zeros(num_positions, gradients.shape[1])
    if grad.device.type == "cpu":
        return grad.index_add_(0, positions, gradients)
    # Sorts the indices, where index_add_ on a GPU would add in any order.
    return grad.index_put_((positions,), gradients, accumulate=True)


def _chunk_positions(weight: Tensor, dtype: torch.dtype, options: Options) -> int:
    """Return how many positions' logits fit into the budget, at least one."""
    # A softcap needs its tanh again for the gradient: a second buffer as large as the logits.
    buffers = 1 if options.softcap is None else 2
    position_bytes = weight.shape[0] * dtype.itemsize * buffers
    if options.chunk_bytes is not None:
        return max(options.chunk_bytes // position_bytes, 1)
    budget = CHUNK_BYTES_CPU if weight.device.type == "cpu" else CHUNK_BYTES_GPU
    return max(budget // position_bytes, MIN_CHUNK_POSITIONS)


def _losses_of_chunk(
    logits: Tensor, targets: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return nll (M,), lse (M,) and d(nll + z_loss * lse^2)/d logits, in place of the logits.

    The target is kept out of the sum of exponentials: with `rest` the sum over the other tokens,
    1 - p(target) is rest / (rest + e_target) without cancellation, and a token that is certain
    keeps a loss and a gradient with full relative precision.
    """
    # Cap the logits; the slope of the cap is needed again for the gradient.
    want_error = options.want_hidden or options.want_weight
    capped_tanh = None
    if options.softcap is not None:
        logits.div_(options.softcap).tanh_()
        capped_tanh = logits.clone() if want_error else None
        logits.mul_(options.softcap)

    # Sum the exponentials of all tokens but the target, relative to the largest logit.
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

    # Turn the exponentials into the gradient of the logits.
    total = rest + target_exp
    from_z_loss = 2.0 * options.z_loss * lse
    error = exps.mul_((1.0 + from_z_loss) / total)
    error.scatter_(1, column, (from_z_loss * target_exp - rest) / total)
    if capped_tanh is not None:
        error.mul_(capped_tanh.square_().neg_().add_(1.0))
    return nll.squeeze(1), lse.squeeze(1), error
