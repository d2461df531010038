"""Philox4x32-10 draws on the GPU: one kernel a call, the bits of `cdpvae_kernels.philox`.

`words` is also what other kernels draw with. The normal draw repeats the reference's fp64 series
operation by operation; it is compiled without fused multiply-add (`LAUNCH_OPTIONS`), since a fused
one rounds once where the definition rounds twice. Additions, products, quotients and square roots
of fp64 are correctly rounded on every GPU.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from cdpvae_kernels import philox
from cdpvae_kernels.launch_configs import LaunchConfig
from cdpvae_kernels.triton_kernels.runtime import Shapes, Specialization, Tunable, configuration

LAUNCH_OPTIONS = {"enable_fp_fusion": False}
EPOCH_BITS = tl.constexpr(philox.EPOCH_BITS)
LOG_SERIES = tl.constexpr(philox.LOG_SERIES)
COSINE_SERIES = tl.constexpr(philox.COSINE_SERIES)
SINE_SERIES = tl.constexpr(philox.SINE_SERIES)
LOG_TERMS = tl.constexpr(len(philox.LOG_SERIES))
COSINE_TERMS = tl.constexpr(len(philox.COSINE_SERIES))
LOG_2 = tl.constexpr(math.log(2.0))
TURN = tl.constexpr(philox.ANGLE_OF_TURN)
MANTISSA_MASK = tl.constexpr((1 << 52) - 1)
HALF_EXPONENT = tl.constexpr(1022 << 52)
ROOT_HALF = tl.constexpr(math.sqrt(0.5))


@triton.jit
def words(seed, stream, sample, epoch, position):
    """The four uint32 words of a draw. seed: int64 holding the bits; sample: int64; others: any."""
    counters = (stream.to(tl.int64) << EPOCH_BITS) | epoch
    return tl.philox(
        seed,
        position.to(tl.uint32),
        sample.to(tl.uint32),
        (sample >> 32).to(tl.uint32),
        counters.to(tl.uint32),
    )


@triton.jit
def _log_of_24_bits(numerator):
    """As `philox._log_of_24_bits`; numerator: integers 1 ... 2^24."""
    value = numerator.to(tl.float64)
    pattern = value.to(tl.int64, bitcast=True)
    exponent = (pattern >> 52) - 1022
    mantissa = ((pattern & MANTISSA_MASK) | HALF_EXPONENT).to(tl.float64, bitcast=True)
    # Subtracted, since a comparison would round the constant to fp32; the sign is exact.
    small = mantissa - ROOT_HALF < 0.0
    mantissa = tl.where(small, mantissa * 2.0, mantissa)
    exponent = exponent - small.to(tl.int64) - 24
    ratio = (mantissa - 1.0) / (mantissa + 1.0)
    square = ratio * ratio
    series = square * 0.0
    for k in tl.static_range(LOG_TERMS):
        series = series * square + LOG_SERIES[k]
    return ratio * series * 2.0 + exponent.to(tl.float64) * LOG_2


@triton.jit
def _cos_of_24_bits(turn):
    """As `philox._cos_of_24_bits`; turn: int64 0 ... 2^24 - 1."""
    quarter = (turn + (1 << 21)) >> 22
    angle = (turn - (quarter << 22)).to(tl.float64) * TURN
    square = angle * angle
    cosine = square * 0.0
    sine = square * 0.0
    for k in tl.static_range(COSINE_TERMS):
        cosine = cosine * square + COSINE_SERIES[k]
        sine = sine * square + SINE_SERIES[k]
    magnitude = tl.where(quarter % 2 == 0, cosine, sine * angle)
    return tl.where((quarter % 4 == 1) | (quarter % 4 == 2), -magnitude, magnitude)


@triton.jit(do_not_specialize=["seed", "stream", "sample_step", "epoch_step", "position_step"])
def draw_kernel(
    sample_ptr,
    epoch_ptr,
    position_ptr,
    out_ptr,
    seed,
    stream,
    sample_step,
    epoch_step,
    position_step,
    size,
    NORMAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """First words as int64, or normals as fp32. A step of 0 repeats one value, 1 walks a tensor."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    sample = tl.load(sample_ptr + index * sample_step, mask=inside, other=0)
    epoch = tl.load(epoch_ptr + index * epoch_step, mask=inside, other=0)
    position = tl.load(position_ptr + index * position_step, mask=inside, other=0)
    first, second, _, _ = words(seed, stream, sample, epoch, position)
    if NORMAL:
        radius = tl.sqrt(_log_of_24_bits((first >> 8).to(tl.int64) + 1) * -2.0)
        value = (radius * _cos_of_24_bits((second >> 8).to(tl.int64))).to(tl.float32)
        tl.store(out_ptr + index, value, mask=inside)
    else:
        tl.store(out_ptr + index, first.to(tl.int64), mask=inside)


def draw(
    sample_index: Tensor,
    epoch: Tensor,
    position: Tensor,
    seed: int,
    stream: int,
    normal: bool,
    configs: dict[str, LaunchConfig] | None = None,
) -> Tensor:
    """Three int64 tensors that broadcast -> int64 words or fp32 normals of the broadcast shape.

    seed: the 64 bits as a signed integer. configs: another table's entries.
    """
    shape = torch.broadcast_shapes(sample_index.shape, epoch.shape, position.shape)
    out = torch.empty(shape, dtype=torch.float32 if normal else torch.int64, device=position.device)
    if out.numel() == 0:
        return out
    counters = [_walked(counter, shape) for counter in (sample_index, epoch, position)]
    steps = [int(counter.numel() > 1) for counter in counters]
    config = configuration("philox.draw", out.device, configs, BLOCK=out.numel())
    grid = (triton.cdiv(out.numel(), config["BLOCK"]),)
    draw_kernel[grid](
        *counters,
        out,
        seed,
        int(stream),
        *steps,
        out.numel(),
        NORMAL=normal,
        **config,
        **LAUNCH_OPTIONS,
    )
    return out


def _walked(counter: Tensor, shape: torch.Size) -> Tensor:
    """Contiguous in the common shape; a single value stays as it is."""
    return counter if counter.numel() == 1 else counter.expand(shape).contiguous()


def specializations() -> dict[str, Specialization]:
    names = ("seed", "sample_step", "epoch_step", "position_step", "size")
    signature = {"sample_ptr": "*i64", "epoch_ptr": "*i64", "position_ptr": "*i64"}
    signature |= {"stream": "i32", **dict.fromkeys(names, "i64")}
    return {
        f"philox.draw {name}": Specialization(
            draw_kernel,
            "philox.draw",
            {**signature, "out_ptr": "*fp32" if normal else "*i64"},
            {"NORMAL": normal},
            options=LAUNCH_OPTIONS,
        )
        for name, normal in (("bits", False), ("normal", True))
    }


def tunables(shapes: Shapes, device: torch.device) -> list[Tunable]:
    """The posterior noise of a batch."""
    rows, latent = shapes.rows, shapes.latent
    sample = torch.arange(rows, device=device)[:, None]
    epoch = torch.zeros((), dtype=torch.int64, device=device)
    position = torch.arange(latent, device=device)[None, :]
    return [
        Tunable(
            "philox.draw",
            {"BLOCK": (64, 128, 256, 512), "num_warps": (1, 2, 4, 8), "num_stages": (1,)},
            lambda config: draw(sample, epoch, position, 7, 0, True, {"philox.draw": config}),
            rows * latent * 20,
        )
    ]
