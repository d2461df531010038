"""Cross-entropy of a linear head on the GPU: two cuBLAS products a chunk, one pass between them.

Legend: M valid target positions, C rows of a chunk, D hidden, V vocabulary.

Per row with target y and logits z everything is measured against the target's own logit:
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

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cdpvae_kernels.launch_configs import LaunchConfig
from cdpvae_kernels.matmul import accumulate, accumulation_dtype, matmul, operand
from cdpvae_kernels.triton_kernels.elementwise import LOG2_E, log1p
from cdpvae_kernels.triton_kernels.runtime import (
    POINTERS,
    Shapes,
    Specialization,
    Tunable,
    configuration,
)

OP = "linear_cross_entropy"
# Logits in fp32 and e in the operands' dtype held at a time, and the fewest rows that keep the
# products bound by arithmetic: below, reading the head for every chunk costs more than using it.
CHUNK_BYTES = 800 << 20
MIN_CHUNK_ROWS = 1024
TILE_ROWS = 128
# e^64 times any vocabulary and any weight stays far below fp32's largest number, 3e38.
LARGEST_GAP = tl.constexpr(64.0)


@triton.jit
def _tanh(x):
    """tanh by exp; the sign is taken off, so that nothing overflows."""
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    magnitude = (1.0 - decay) / (1.0 + decay)
    return tl.where(x < 0.0, -magnitude, magnitude)


@triton.jit
def _capped(raw, softcap, HAS_SOFTCAP: tl.constexpr):
    """The logit after the soft cap, and d logit / d raw."""
    if HAS_SOFTCAP:
        tanh = _tanh(raw / softcap)
        logit = tanh * softcap
        slope = 1.0 - tanh * tanh
    else:
        logit = raw
        slope = 1.0
    return logit, slope


@triton.jit
def _gaps(logits_ptr, columns, vocab, target, target_logit, softcap, HAS_SOFTCAP: tl.constexpr):
    """z_v - z_y, -inf at the target and past the vocabulary, and the slope of the soft cap."""
    inside = columns < vocab
    raw = tl.load(logits_ptr + columns, mask=inside, other=0.0)
    logit, slope = _capped(raw, softcap, HAS_SOFTCAP)
    others = inside & (columns != target)
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
    STORE_EXPS: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program a row. NARROW: the exponents of `exps` are too few for the target's reference."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * vocab
    exps_ptr += row * vocab
    target = tl.load(targets_ptr + row)
    target_logit, target_slope = _capped(tl.load(logits_ptr + target), softcap, HAS_SOFTCAP)
    offsets = tl.arange(0, BLOCK_V)
    sums = tl.zeros([BLOCK_V], tl.float32)
    peaks = tl.full([BLOCK_V], float("-inf"), tl.float32)
    for start in range(0, vocab, BLOCK_V):
        columns = start + offsets
        gap, slope, inside = _gaps(
            logits_ptr, columns, vocab, target, target_logit, softcap, HAS_SOFTCAP
        )
        peaks = tl.maximum(peaks, gap)
        exp = tl.exp2(tl.minimum(gap, LARGEST_GAP) * LOG2_E)
        sums += exp
        if STORE_EXPS and not NARROW:
            tl.store(exps_ptr + columns, (exp * slope).to(exps_ptr.dtype.element_ty), mask=inside)
    rest = tl.sum(sums, axis=0)
    peak = tl.max(peaks, axis=0)
    shift = 0.0
    if NARROW | (peak > LARGEST_GAP):
        # A vocabulary of one token has no other: its peak is -inf, its rest 0.
        shift = tl.where(peak > float("-inf"), peak, 0.0)
        sums = tl.zeros([BLOCK_V], tl.float32)
        for start in range(0, vocab, BLOCK_V):
            columns = start + offsets
            gap, slope, inside = _gaps(
                logits_ptr, columns, vocab, target, target_logit, softcap, HAS_SOFTCAP
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
    nll = tl.maximum(shift, 0.0) + log1p(rest * of_rest + (of_target - 1.0))
    lse = target_logit + nll
    tl.store(nll_ptr + row, nll)
    tl.store(lse_ptr + row, lse)
    if STORE_EXPS:
        from_z_loss = 2.0 * z_loss * lse
        p_others = of_rest / total
        tl.store(others_ptr + row, (1.0 + from_z_loss) * p_others)
        of_y = from_z_loss * (of_target / total) - rest * p_others
        tl.store(target_coefficient_ptr + row, of_y * target_slope)


@triton.jit
def error_kernel(
    exps_ptr, targets_ptr, others_ptr, target_coefficient_ptr, vocab, BLOCK_V: tl.constexpr
):
    """e -> d loss / d logits, in place. Grid (rows, blocks of the vocabulary)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = columns < vocab
    exps_ptr += row * vocab
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
    """scale * (others * e W + target_coefficient * W_y). Grid (rows, blocks of the width)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < width
    target = tl.load(targets_ptr + row).to(tl.int64)
    of_y = tl.load(weight_ptr + target * width + columns, mask=inside, other=0.0).to(tl.float32)
    product = tl.load(product_ptr + row * width + columns, mask=inside, other=0.0)
    others = tl.load(others_ptr + row)
    grad = product * others + of_y * tl.load(target_coefficient_ptr + row)
    grad *= tl.load(scale_ptr)
    tl.store(grad_ptr + row * width + columns, grad.to(grad_ptr.dtype.element_ty), mask=inside)


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
        _launch_rows(logits[:size], exps, per_row, nll[chunk], lse[chunk], z_loss, softcap, configs)
        if want_hidden:
            product = matmul(operand(exps[:size]), head)
            _launch_finish(product, head, per_row, scale, grad_rows[chunk], configs)
        if want_weight:
            _launch_error(exps[:size], per_row, configs)
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


def _launch_rows(logits, exps, per_row, nll, lse, z_loss, softcap, configs) -> None:
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


def _launch_error(exps, per_row, configs) -> None:
    rows, vocab = exps.shape
    config = configuration(f"{OP}.error", exps.device, configs, BLOCK_V=vocab)
    grid = (rows, triton.cdiv(vocab, config["BLOCK_V"]))
    error_kernel[grid](exps, *per_row, vocab, **config)


def _launch_finish(product, head, per_row, scale, grad, configs) -> None:
    rows, width = product.shape
    config = configuration(f"{OP}.finish", product.device, configs, BLOCK_D=width)
    grid = (rows, triton.cdiv(width, config["BLOCK_D"]))
    finish_kernel[grid](product, head, *per_row, scale, grad, width, **config)


def specializations() -> dict[str, Specialization]:
    """For V=128256, D=4096 with bf16 operands; fp16 reads every row twice, see NARROW."""
    per_row = {
        "targets_ptr": "*i64",
        "others_ptr": "*fp32",
        "target_coefficient_ptr": "*fp32",
    }
    out = {}
    for dtype, softcap in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False)):
        name = POINTERS[dtype].strip("*") + (" softcap" if softcap else "")
        out[f"{OP}.rows {name}"] = Specialization(
            rows_kernel,
            f"{OP}.rows",
            {
                "logits_ptr": "*fp32",
                "exps_ptr": POINTERS[dtype],
                "nll_ptr": "*fp32",
                "lse_ptr": "*fp32",
                **per_row,
                "vocab": "i32",
                "z_loss": "fp32",
                "softcap": "fp32",
            },
            {"HAS_SOFTCAP": softcap, "STORE_EXPS": True, "NARROW": dtype == torch.float16},
            ("logits_ptr", "exps_ptr", "vocab"),
        )
    out[f"{OP}.error bf16"] = Specialization(
        error_kernel,
        f"{OP}.error",
        {"exps_ptr": "*bf16", **per_row, "vocab": "i32"},
        aligned=("exps_ptr", "vocab"),
    )
    out[f"{OP}.finish bf16"] = Specialization(
        finish_kernel,
        f"{OP}.finish",
        {
            "product_ptr": "*fp32",
            "weight_ptr": "*bf16",
            **per_row,
            "scale_ptr": "*fp32",
            "grad_ptr": "*bf16",
            "width": "i32",
        },
        aligned=("product_ptr", "weight_ptr", "grad_ptr", "width"),
    )
    return out


def tunables(shapes: Shapes, device: torch.device) -> list[Tunable]:
    """The three kernels on one chunk of random logits."""
    rows, vocab, width = shapes.chunk, shapes.vocab, shapes.width
    fp32 = {"dtype": torch.float32, "device": device}
    draw = {"dtype": shapes.dtype, "device": device}
    logits, weight = torch.randn(rows, vocab, **fp32), torch.randn(vocab, width, **draw)
    exps, grad = torch.ones(rows, vocab, **draw), torch.empty(rows, width, **draw)
    product = torch.randn(rows, width, **fp32)
    targets = torch.randint(vocab, (rows,), device=device)
    per_row = (targets, torch.ones(rows, **fp32), torch.ones(rows, **fp32))
    nll, lse, scale = torch.empty(rows, **fp32), torch.empty(rows, **fp32), torch.ones((), **fp32)
    half = shapes.dtype.itemsize

    def launcher(name, launch):
        return lambda config: launch({f"{OP}.{name}": config})

    return [
        Tunable(
            f"{OP}.rows",
            {
                "BLOCK_V": (1024, 2048, 4096, 8192, 16384),
                "num_warps": (4, 8, 16, 32),
                "num_stages": (1, 2, 3),
            },
            launcher(
                "rows",
                lambda c: _launch_rows(logits, exps, per_row, nll, lse, 0.0, None, c),
            ),
            rows * vocab * (4 + half),
        ),
        Tunable(
            f"{OP}.error",
            {"BLOCK_V": (1024, 2048, 4096, 8192), "num_warps": (4, 8, 16), "num_stages": (1,)},
            launcher("error", lambda c: _launch_error(exps, per_row, c)),
            rows * vocab * 2 * half,
        ),
        Tunable(
            f"{OP}.finish",
            {
                "BLOCK_D": (256, 512, 1024, 2048, 4096),
                "num_warps": (1, 2, 4, 8),
                "num_stages": (1,),
            },
            launcher(
                "finish",
                lambda c: _launch_finish(product, weight, per_row, scale, grad, c),
            ),
            rows * width * (4 + 2 * half),
        ),
    ]
