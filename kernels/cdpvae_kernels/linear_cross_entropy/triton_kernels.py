"""The kernels of the reconstruction loss: one pass between the two cuBLAS products of a chunk.

Legend: M valid target positions, C positions of a chunk, D hidden, V vocabulary. A row here is a
row of the (C, V) matrix of logits: the logits of one position.

For a position with target y and logits z everything is measured against the target's own logit:
e_v = exp(z_v - z_y) for v != y, S = sum e_v, then loss = log1p(S), lse = z_y + loss,
1 - p(y) = S / (1 + S) and

    d loss / d x = (sum e_v W_v - S W_y) / (1 + S).

So the row is read once (no pass for the maximum), a token that is certain keeps its loss and
gradient to full relative precision (no softmax - 1), and e goes into the second product unscaled,
in the operands' dtype: bf16 has fp32's exponents. Where some z_v lies more than LARGEST_GAP above
z_y the sum could overflow; such a row is read again against its largest other logit, which is what
fp16, with its narrow exponents, does for every row.

    rows    logits (C, V) fp32 -> e (C, V), nll, lse, the two coefficients of the gradient
    error   e -> d loss / d logits, only for a head that wants its own gradient
    finish  e W (C, D) fp32, coefficients, W_y -> d loss / d x in the dtype of x
"""

import triton
import triton.language as tl

from cdpvae_kernels.common.triton_elementwise import LOG2_E, log1p

# e^64 times any vocabulary and any weight stays far below fp32's largest number, 3e38.
LARGEST_GAP = tl.constexpr(64.0)


@triton.jit
def _tanh(x):
    """Compute tanh by exp; the sign is taken off, so that nothing overflows."""
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    magnitude = (1.0 - decay) / (1.0 + decay)
    return tl.where(x < 0.0, -magnitude, magnitude)


@triton.jit
def _capped(raw, softcap, HAS_SOFTCAP: tl.constexpr):
    """Return the logit after the soft cap, and d logit / d raw."""
    if HAS_SOFTCAP:
        tanh = _tanh(raw / softcap)
        logit = tanh * softcap
        slope = 1.0 - tanh * tanh
    else:
        logit = raw
        slope = 1.0
    return logit, slope


@triton.jit
def _gaps(
    logits_ptr,
    columns,
    vocab,
    target,
    target_logit,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    IGNORES: tl.constexpr,
):
    """Return z_v - z_y and the slope of the soft cap; -inf at the target and past the end."""
    inside = columns < vocab
    counts = inside
    # An ignored position reads no logit and has no other token: its e and their sum are 0.
    if IGNORES:
        counts = inside & (target >= 0)
    raw = tl.load(logits_ptr + columns, mask=counts, other=0.0)
    logit, slope = _capped(raw, softcap, HAS_SOFTCAP)
    others = counts & (columns != target)
    return tl.where(others, logit - target_logit, float("-inf")), slope, inside


@triton.jit
def rows_kernel(
    logits_ptr,
    exps_ptr,
    targets_ptr,
    nll_ptr,
    lse_ptr,
    others_ptr,
    target_coefficient_ptr,
    vocab,
    z_loss,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    IGNORES: tl.constexpr,
    STORE_EXPS: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Turn logits into e, losses and coefficients. Grid: rows.

    IGNORES: a target may be negative; then e, nll, lse and the coefficient of W_y are 0.
    NARROW: the exponents of `exps` are too few for e relative to the target's own logit.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * vocab
    exps_ptr += row * vocab
    target = tl.load(targets_ptr + row)
    # The reference of all exponents: the target's own logit.
    tl.device_assert(target < vocab, "a target is outside the vocabulary")
    if IGNORES:
        raw = tl.load(logits_ptr + target, mask=target >= 0, other=0.0)
    else:
        tl.device_assert(target >= 0, "a target is negative")
        raw = tl.load(logits_ptr + target)
    target_logit, target_slope = _capped(raw, softcap, HAS_SOFTCAP)
    offsets = tl.arange(0, BLOCK_V)
    sums = tl.zeros([BLOCK_V], tl.float32)
    # The first pass, in which no exponent exceeds LARGEST_GAP.
    peaks = tl.full([BLOCK_V], float("-inf"), tl.float32)
    for start in range(0, vocab, BLOCK_V):
        columns = start + offsets
        gap, slope, inside = _gaps(
            logits_ptr, columns, vocab, target, target_logit, softcap, HAS_SOFTCAP, IGNORES
        )
        peaks = tl.maximum(peaks, gap)
        # A GPU's minimum of NaN and a number is the number: a row of NaN would get a finite loss.
        # The peak may drop NaN, since the sum carries it.
        bounded = tl.minimum(gap, LARGEST_GAP, propagate_nan=tl.PropagateNan.ALL)
        exp = tl.exp2(bounded * LOG2_E)
        sums += exp
        if STORE_EXPS and not NARROW:
            tl.store(exps_ptr + columns, (exp * slope).to(exps_ptr.dtype.element_ty), mask=inside)
    rest = tl.sum(sums, axis=0)
    peak = tl.max(peaks, axis=0)
    shift = 0.0
    # The second pass, where the first could not hold the exponents: relative to the largest logit.
    if NARROW | (peak > LARGEST_GAP):
        # A vocabulary of one token has no other: its peak is -inf, its rest 0.
        shift = tl.where(peak > float("-inf"), peak, 0.0)
        sums = tl.zeros([BLOCK_V], tl.float32)
        for start in range(0, vocab, BLOCK_V):
            columns = start + offsets
            gap, slope, inside = _gaps(
                logits_ptr, columns, vocab, target, target_logit, softcap, HAS_SOFTCAP, IGNORES
            )
            exp = tl.exp2((gap - shift) * LOG2_E)
            sums += exp
            if STORE_EXPS:
                stored = (exp * slope).to(exps_ptr.dtype.element_ty)
                tl.store(exps_ptr + columns, stored, mask=inside)
        rest = tl.sum(sums, axis=0)

    # e is relative to z_y + shift. One of the two factors is 1: neither can overflow.
    of_rest = tl.exp2(tl.minimum(shift, 0.0) * LOG2_E)
    of_target = tl.exp2(-tl.maximum(shift, 0.0) * LOG2_E)
    total = of_target + rest * of_rest
    # The loss. Its first summand is 0 where the target is the best token.
    nll = tl.maximum(shift, 0.0) + log1p(rest * of_rest + (of_target - 1.0))
    lse = target_logit + nll
    tl.store(nll_ptr + row, nll)
    tl.store(lse_ptr + row, lse)
    if STORE_EXPS:
        # What the gradient multiplies e W and the target's row of the head with.
        from_z_loss = 2.0 * z_loss * lse
        p_others = of_rest / total
        tl.store(others_ptr + row, (1.0 + from_z_loss) * p_others)
        of_y = from_z_loss * (of_target / total) - rest * p_others
        tl.store(target_coefficient_ptr + row, of_y * target_slope)


@triton.jit
def error_kernel(
    exps_ptr, targets_ptr, others_ptr, target_coefficient_ptr, vocab, BLOCK_V: tl.constexpr
):
    """Turn e into d loss / d logits, in place. Grid (rows, blocks of the vocabulary)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = columns < vocab
    exps_ptr += row * vocab
    # The target's own column has no e: its error is known already.
    exp = tl.load(exps_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    error = tl.where(
        columns == tl.load(targets_ptr + row),
        tl.load(target_coefficient_ptr + row),
        exp * tl.load(others_ptr + row),
    )
    tl.store(exps_ptr + columns, error.to(exps_ptr.dtype.element_ty), mask=inside)


@triton.jit
def finish_kernel(
    product_ptr,
    weight_ptr,
    targets_ptr,
    others_ptr,
    target_coefficient_ptr,
    scale_ptr,
    grad_ptr,
    width,
    BLOCK_D: tl.constexpr,
):
    """Compute scale * (others * e W + target_coefficient * W_y).

    Grid (rows, blocks of the width).
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < width
    target = tl.load(targets_ptr + row).to(tl.int64)
    # The target's row of the head, and the sum over all other rows. An ignored position has none.
    of_y = tl.load(weight_ptr + target * width + columns, mask=inside & (target >= 0), other=0.0)
    of_y = of_y.to(tl.float32)
    product = tl.load(product_ptr + row * width + columns, mask=inside, other=0.0)
    others = tl.load(others_ptr + row)
    grad = product * others + of_y * tl.load(target_coefficient_ptr + row)
    # Scaled in fp32, before the one rounding to the dtype of the gradient.
    grad *= tl.load(scale_ptr)
    tl.store(grad_ptr + row * width + columns, grad.to(grad_ptr.dtype.element_ty), mask=inside)
