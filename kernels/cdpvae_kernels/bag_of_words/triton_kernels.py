"""Kernels of the bag-of-words losses: neither logits nor a multi-hot target in memory.

Legend: B rows, Z latent, V vocabulary, T packed tokens, G programs.

A program takes every G-th block of the vocabulary. It reads the block of the weight, makes its
logits, and before it drops them turns them into the loss, the gradient of z (kept in registers over
all its blocks) and the errors, d loss / d logit (B, V), which the backward pass multiplies with z.
The errors, in the operands' dtype, are written and read once: 2 B V numbers. The gradient of the
weight, were it made here and scaled in the backward pass, would take 2 V Z more: worse while B < Z,
and an upstream gradient would round it twice. More than BLOCK_B rows take several turns over the
program's share of the weight, which by then is in the L2 cache: memory is read once.

Sums over programs are one `sum` over a fixed axis, targets are set by integers: every result has
the same bits each time.

    targets       ids -> one bit per row and token: a set, whatever the order and the repeats
    errors        BCE: weight, z, bits -> loss, gradient of z, errors; categorical: with the
                  log-sum-exp in the place of the bits
    log_sum_exp   categorical: a pass over the weight of its own, to (G, B)
    bag           categorical: the mean of the weight's rows over a row's tokens
    cells         categorical: the errors at a row's own tokens, p - count / length
    head          errors, z -> gradients of weight and bias

Floor for bf16 operands at Z = 64, V = 128,256: weight 16.4 MB read, its gradient 16.4 MB written,
errors 4 B V bytes: 66 MB at B = 64, 76 us on an L40S (864 GB/s), 14 us on an H200 (4.8 TB/s).
The categorical loss reads the weight twice.

Where z and weight have one half precision, they and the errors go through the tensor cores as they
are, with fp32 sums. Everything else is computed in fp32, products too. `triton_launch.py` launches
these kernels.
"""

import triton
import triton.language as tl

from cdpvae_kernels.common.triton_elementwise import LOG2_E, softplus_and_sigmoid
from cdpvae_kernels.common.triton_packing import sequence_of

# Targets that share a word.
BITS = tl.constexpr(32)


@triton.jit
def _is_token(token_id, vocab):
    """Tell whether ids are in the vocabulary.

    A negative one is to be ignored. No GPU's ids are checked: one that is too large must not be
    read or written for either; under TRITON_DEBUG=1 it is an error.
    """
    tl.device_assert((token_id >= -1) & (token_id < vocab), "an id is outside the vocabulary")
    return (token_id >= 0) & (token_id < vocab)


@triton.jit
def targets_kernel(
    ids_ptr,
    cu_seqlens_ptr,
    bits_ptr,
    num_tokens,
    num_rows,
    vocab,
    num_words,
    STEPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Set the bit of every token in its row. Grid: blocks of tokens."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = token < num_tokens
    row = sequence_of(tl.where(inside, token, 0), cu_seqlens_ptr, num_rows, 0, STEPS)
    token_id = tl.load(ids_ptr + token, mask=inside, other=0).to(tl.int64)
    inside &= _is_token(token_id, vocab)
    bit = tl.full([BLOCK_T], 1, tl.int32) << (token_id % BITS).to(tl.int32)
    word = row.to(tl.int64) * num_words + token_id // BITS
    tl.atomic_or(bits_ptr + word, bit, mask=inside, sem="relaxed")


@triton.jit
def _matrix(ptr, first, num_rows, width, BLOCK: tl.constexpr, BLOCK_Z: tl.constexpr):
    """Load rows first ... first + BLOCK of a (num_rows, width) matrix, zeros beyond it."""
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_Z)
    ptr += tl.cast(first, tl.int64) * width
    mask = (first + row < num_rows)[:, None] & (column < width)[None, :]
    return tl.load(ptr + row[:, None] * width + column[None, :], mask=mask, other=0.0)


@triton.jit
def _product(a, b):
    """Multiply a b in fp32.

    A product of fp32 with a half precision is exact and yet on the tensor cores: three numbers of
    8 bits (bf16) or 11 (fp16) add up to one of fp32's 24.
    """
    if a.dtype == b.dtype:
        return tl.dot(a, b, input_precision="ieee")
    high = a.to(b.dtype)
    rest = a - high.to(tl.float32)
    middle = rest.to(b.dtype)
    low = (rest - middle.to(tl.float32)).to(b.dtype)
    return tl.dot(high, b, acc=tl.dot(middle, b, acc=tl.dot(low, b)))


@triton.jit
def _logits(z, weight, bias_ptr, columns, vocab):
    """Compute z W^T + b, -inf past the vocabulary.

    Every loss, probability and error is 0 there.
    """
    bias = tl.load(bias_ptr + columns, mask=columns < vocab, other=float("-inf")).to(tl.float32)
    return _product(z, tl.trans(weight)) + bias[None, :]


@triton.jit
def log_sum_exp_kernel(
    z_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    vocab,
    width,
    BLOCK_Z: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Compute each program's log of the sum of exp over its blocks -> (G, B)."""
    program = tl.program_id(0)
    stride = tl.num_programs(0) * BLOCK_V
    for first in range(0, num_rows, BLOCK_B):
        row = first + tl.arange(0, BLOCK_B)
        z = _matrix(z_ptr, first, num_rows, width, BLOCK_B, BLOCK_Z)
        # A running log-sum-exp: the peak so far, and the sum relative to it.
        peak = tl.full([BLOCK_B], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_B], tl.float32)
        for start in range(program * BLOCK_V, vocab, stride):
            weight = _matrix(weight_ptr, start, vocab, width, BLOCK_V, BLOCK_Z)
            logits = _logits(z, weight, bias_ptr, start + tl.arange(0, BLOCK_V), vocab)
            higher = tl.maximum(peak, tl.max(logits, axis=1))
            # A head may forbid tokens by a bias of -inf: nothing is subtracted from nothing.
            shift = tl.where(higher > float("-inf"), higher, 0.0)
            exps = tl.exp2((logits - shift[:, None]) * LOG2_E)
            total = total * tl.exp2((peak - shift) * LOG2_E) + tl.sum(exps, axis=1)
            peak = higher
        tl.store(out_ptr + program * num_rows + row, peak + tl.log(total), mask=row < num_rows)


@triton.jit
def errors_kernel(
    z_ptr,
    weight_ptr,
    bias_ptr,
    bits_ptr,
    lse_ptr,
    loss_ptr,
    grad_z_ptr,
    errors_ptr,
    num_rows,
    vocab,
    width,
    num_words,
    CATEGORICAL: tl.constexpr,
    WANT_Z: tl.constexpr,
    WANT_HEAD: tl.constexpr,
    LIFT: tl.constexpr,
    BLOCK_Z: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Compute the gradient of z (G, B, Z) and LIFT x errors (B, V); for the BCE the loss (G,) too.

    The categorical errors here are the probabilities alone; `cells_kernel` and `bag_kernel` add
    what the targets do.
    """
    program = tl.program_id(0)
    stride = tl.num_programs(0) * BLOCK_V
    latent = tl.arange(0, BLOCK_Z)
    local = tl.arange(0, BLOCK_B)
    loss = 0.0
    for first in range(0, num_rows, BLOCK_B):
        row = first + local
        valid = row < num_rows
        z = _matrix(z_ptr, first, num_rows, width, BLOCK_B, BLOCK_Z)
        # What a block of rows sums up over all of this program's blocks of the vocabulary.
        losses = tl.zeros([BLOCK_B], tl.float32)
        grad_z = tl.zeros([BLOCK_B, BLOCK_Z], tl.float32)
        if CATEGORICAL:
            lse = tl.load(lse_ptr + row, mask=valid, other=float("inf"))
        for start in range(program * BLOCK_V, vocab, stride):
            columns = start + tl.arange(0, BLOCK_V)
            weight = _matrix(weight_ptr, start, vocab, width, BLOCK_V, BLOCK_Z)
            # Logits live in registers only: they become errors and are dropped.
            logits = _logits(z, weight, bias_ptr, columns, vocab)
            if CATEGORICAL:
                error = tl.exp2((logits - lse[:, None]) * LOG2_E)
            else:
                # Each column's target is a bit of the word that it shares with its neighbours.
                words = tl.load(
                    bits_ptr
                    + tl.cast(first, tl.int64) * num_words
                    + (local[:, None] * num_words + (columns // BITS)[None, :]),
                    mask=valid[:, None] & (columns < vocab)[None, :],
                    other=0,
                )
                present = ((words >> (columns % BITS)[None, :]) & 1) != 0
                # By the sign of the logit both classes are softplus, without 1 - p.
                softplus, sigmoid = softplus_and_sigmoid(tl.where(present, -logits, logits))
                losses += tl.sum(softplus, axis=1)
                error = tl.where(present, -sigmoid, sigmoid)
            # Lifted so that fp16 holds the small ones; taken off again behind the product.
            if WANT_Z or WANT_HEAD:
                lifted = (error * LIFT).to(z.dtype)
            if WANT_Z:
                grad_z += _product(lifted, weight)
            if WANT_HEAD:
                tl.store(
                    errors_ptr
                    + tl.cast(first, tl.int64) * vocab
                    + (local[:, None] * vocab + columns[None, :]),
                    lifted,
                    mask=valid[:, None] & (columns < vocab)[None, :],
                )
        # Rows past the end have read zeros, whose loss is not 0.
        loss += tl.sum(tl.where(valid, losses, 0.0), axis=0)
        if WANT_Z:
            target = (program * num_rows + row).to(tl.int64)[:, None] * width + latent[None, :]
            mask = valid[:, None] & (latent < width)[None, :]
            tl.store(grad_z_ptr + target, grad_z * (1.0 / LIFT), mask=mask)
    if not CATEGORICAL:
        tl.store(loss_ptr + program, loss)


@triton.jit
def bag_kernel(
    z_ptr,
    weight_ptr,
    bias_ptr,
    ids_ptr,
    cu_seqlens_ptr,
    mean_weight_ptr,
    mean_logit_ptr,
    counts_ptr,
    vocab,
    width,
    BLOCK_Z: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Average over a row's tokens their rows of the weight and their logits, and count them.

    Grid: rows.
    """
    row = tl.program_id(0)
    latent = tl.arange(0, BLOCK_Z)
    used = latent < width
    start = tl.load(cu_seqlens_ptr + row)
    end = tl.load(cu_seqlens_ptr + row + 1)
    # Sums over the row's tokens, a block of them at a time.
    weights = tl.zeros([BLOCK_Z], tl.float32)
    bias = 0.0
    count = 0
    for first in range(start, end, BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)
        token_id = tl.load(ids_ptr + token, mask=token < end, other=-1).to(tl.int64)
        inside = _is_token(token_id, vocab)
        count += tl.sum(inside.to(tl.int32), axis=0)
        rows = tl.load(
            weight_ptr + token_id[:, None] * width + latent[None, :],
            mask=inside[:, None] & used[None, :],
            other=0.0,
        )
        weights += tl.sum(rows.to(tl.float32), axis=0)
        biases = tl.load(bias_ptr + token_id, mask=inside, other=0.0)
        bias += tl.sum(biases.to(tl.float32), axis=0)
    # A row without tokens has the mean 0.
    tl.store(counts_ptr + row, count)
    length = tl.maximum(count, 1).to(tl.float32)
    weights /= length
    # The mean logit follows from the mean of the weight's rows.
    z = tl.load(z_ptr + row * width + latent, mask=used, other=0.0).to(tl.float32)
    tl.store(mean_weight_ptr + row * width + latent, weights, mask=used)
    tl.store(mean_logit_ptr + row, tl.sum(z * weights, axis=0) + bias / length)


@triton.jit
def cells_kernel(
    z_ptr,
    weight_ptr,
    bias_ptr,
    ids_ptr,
    cu_seqlens_ptr,
    lse_ptr,
    counts_ptr,
    errors_ptr,
    num_tokens,
    num_rows,
    vocab,
    width,
    STEPS: tl.constexpr,
    LIFT: tl.constexpr,
    BLOCK_Z: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Set errors[row, id] = LIFT x (p - count / length) for every token, its count within its row.

    Each token compares itself with all of its row: length^2 comparisons of integers, no memory.
    Only the first of equal tokens writes, so no cell is written twice.
    """
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    # Past the end the last token stands in, so that the block's rows stay together.
    row = sequence_of(tl.minimum(token, num_tokens - 1), cu_seqlens_ptr, num_rows, 0, STEPS)
    start = tl.load(cu_seqlens_ptr + row)
    end = tl.load(cu_seqlens_ptr + row + 1)
    token_id = tl.load(ids_ptr + token, mask=token < num_tokens, other=-1).to(tl.int64)
    inside = _is_token(token_id, vocab)
    # How often each token occurs in its row, and how often before itself.
    count = tl.zeros([BLOCK_T], tl.int32)
    earlier = tl.zeros([BLOCK_T], tl.int32)
    last = tl.max(end, axis=0)
    for first in range(tl.min(start, axis=0), last, BLOCK_T):
        other = first + tl.arange(0, BLOCK_T)
        other_id = tl.load(ids_ptr + other, mask=other < last, other=-1).to(tl.int64)
        same = token_id[:, None] == other_id[None, :]
        same &= (other[None, :] >= start[:, None]) & (other[None, :] < end[:, None])
        count += tl.sum(same.to(tl.int32), axis=1)
        earlier += tl.sum((same & (other[None, :] < token[:, None])).to(tl.int32), axis=1)

    latent = tl.arange(0, BLOCK_Z)
    mask = inside[:, None] & (latent < width)[None, :]
    # The probability anew, in fp32: the stored error has been rounded already.
    z = tl.load(z_ptr + row[:, None] * width + latent[None, :], mask=mask, other=0.0)
    weight = tl.load(weight_ptr + token_id[:, None] * width + latent[None, :], mask=mask, other=0.0)
    bias = tl.load(bias_ptr + token_id, mask=inside, other=0.0).to(tl.float32)
    logit = tl.sum(z.to(tl.float32) * weight.to(tl.float32), axis=1) + bias
    p = tl.exp2((logit - tl.load(lse_ptr + row)) * LOG2_E)
    # A token that counts is one of at least 1; the others write nothing.
    length = tl.maximum(tl.load(counts_ptr + row), 1)
    error = p - count.to(tl.float32) / length.to(tl.float32)
    cell = row.to(tl.int64) * vocab + token_id
    error = (error * LIFT).to(errors_ptr.dtype.element_ty)
    tl.store(errors_ptr + cell, error, mask=inside & (earlier == 0))


@triton.jit
def head_kernel(
    errors_ptr,
    z_ptr,
    upstream_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    num_rows,
    vocab,
    width,
    LIFT: tl.constexpr,
    BLOCK_Z: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Compute upstream x errors^T z and upstream x the sum of errors.

    Grid: blocks of the vocabulary.
    """
    start = tl.program_id(0) * BLOCK_V
    columns = start + tl.arange(0, BLOCK_V)
    latent = tl.arange(0, BLOCK_Z)
    grad_weight = tl.zeros([BLOCK_V, BLOCK_Z], tl.float32)
    # Summed over all rows in one program: no order of summation is left to chance.
    grad_bias = tl.zeros([BLOCK_V], tl.float32)
    local = tl.arange(0, BLOCK_B)
    for first in range(0, num_rows, BLOCK_B):
        z = _matrix(z_ptr, first, num_rows, width, BLOCK_B, BLOCK_Z)
        errors = tl.load(
            errors_ptr
            + tl.cast(first, tl.int64) * vocab
            + (local[:, None] * vocab + columns[None, :]),
            mask=(first + local < num_rows)[:, None] & (columns < vocab)[None, :],
            other=0.0,
        )
        grad_weight += tl.dot(tl.trans(errors), z, input_precision="ieee")
        grad_bias += tl.sum(errors.to(tl.float32), axis=0)
    # The lift comes off and the upstream gradient goes on before the one rounding.
    scale = tl.load(upstream_ptr) * (1.0 / LIFT)
    grad_weight_ptr += tl.cast(start, tl.int64) * width
    target = tl.arange(0, BLOCK_V)[:, None] * width + latent[None, :]
    mask = (columns < vocab)[:, None] & (latent < width)[None, :]
    grad_weight = (grad_weight * scale).to(grad_weight_ptr.dtype.element_ty)
    tl.store(grad_weight_ptr + target, grad_weight, mask=mask)
    grad_bias = (grad_bias * scale).to(grad_bias_ptr.dtype.element_ty)
    tl.store(grad_bias_ptr + columns, grad_bias, mask=columns < vocab)
