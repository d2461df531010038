"""The kernel of the Philox4x32-10 draws: one launch a call, the bits of `reference.py`.

`words` is also what other kernels draw with. The normal draw repeats the reference's fp64 series
operation by operation; it is compiled without fused multiply-add (`LAUNCH_OPTIONS` in
`triton_launch.py`), since a fused one rounds once where the definition rounds twice. Additions,
products, quotients and square roots of fp64 are correctly rounded on every GPU.
"""

import math

import triton
import triton.language as tl

from cdpvae_kernels.philox import reference

# The reference's constants, so that both sides cannot drift apart.
EPOCH_BITS = tl.constexpr(reference.EPOCH_BITS)
LOG_SERIES = tl.constexpr(reference.LOG_SERIES)
COSINE_SERIES = tl.constexpr(reference.COSINE_SERIES)
SINE_SERIES = tl.constexpr(reference.SINE_SERIES)
LOG_TERMS = tl.constexpr(len(reference.LOG_SERIES))
COSINE_TERMS = tl.constexpr(len(reference.COSINE_SERIES))
LOG_2 = tl.constexpr(math.log(2.0))
TURN = tl.constexpr(reference.ANGLE_OF_TURN)
# The fields of an fp64: frexp is done on its bits.
MANTISSA_MASK = tl.constexpr((1 << 52) - 1)
HALF_EXPONENT = tl.constexpr(1022 << 52)
ROOT_HALF = tl.constexpr(math.sqrt(0.5))


@triton.jit
def words(seed, stream, sample, epoch, position):
    """Compute the four uint32 words of a draw.

    seed: int64 holding the bits. sample: int64. The others: any integers.
    """
    # The fourth counter holds two fields; the other three are cut from the arguments.
    counters = (stream.to(tl.int64) << EPOCH_BITS) | epoch
    return tl.philox(
        seed,
        position.to(tl.uint32),
        sample.to(tl.uint32),
        (sample >> 32).to(tl.uint32),
        counters.to(tl.uint32),
    )


@triton.jit
def log_of_24_bits(numerator):
    """Compute what `reference.log_of_24_bits` does; numerator: integers 1 ... 2^24."""
    value = numerator.to(tl.float64)
    pattern = value.to(tl.int64, bitcast=True)
    exponent = (pattern >> 52) - 1022
    mantissa = ((pattern & MANTISSA_MASK) | HALF_EXPONENT).to(tl.float64, bitcast=True)
    # Subtracted, since a comparison would round the constant to fp32; the sign is exact.
    small = mantissa - ROOT_HALF < 0.0
    mantissa = tl.where(small, mantissa * 2.0, mantissa)
    exponent = exponent - small.to(tl.int64) - 24
    # The series, term by term in the reference's order.
    ratio = (mantissa - 1.0) / (mantissa + 1.0)
    square = ratio * ratio
    series = square * 0.0
    for k in tl.static_range(LOG_TERMS):
        series = series * square + LOG_SERIES[k]
    return ratio * series * 2.0 + exponent.to(tl.float64) * LOG_2


@triton.jit
def cos_of_24_bits(turn):
    """Compute what `reference.cos_of_24_bits` does; turn: int64 0 ... 2^24 - 1."""
    # The nearest quarter turn is taken off in integers, exactly.
    quarter = (turn + (1 << 21)) >> 22
    angle = (turn - (quarter << 22)).to(tl.float64) * TURN
    square = angle * angle
    cosine = square * 0.0
    sine = square * 0.0
    for k in tl.static_range(COSINE_TERMS):
        cosine = cosine * square + COSINE_SERIES[k]
        sine = sine * square + SINE_SERIES[k]
    # Quarter turns 0 ... 4 give cos, -sin, -cos, sin, cos.
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
    """Draw first words as int64, or normals as fp32.

    A step of 0 repeats one value, a step of 1 walks through a tensor.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    # Each counter is read where it is: one value, or one per element.
    sample = tl.load(sample_ptr + index * sample_step, mask=inside, other=0)
    epoch = tl.load(epoch_ptr + index * epoch_step, mask=inside, other=0)
    position = tl.load(position_ptr + index * position_step, mask=inside, other=0)
    first, second, _, _ = words(seed, stream, sample, epoch, position)
    if NORMAL:
        # Box and Muller in fp64, rounded once.
        radius = tl.sqrt(log_of_24_bits((first >> 8).to(tl.int64) + 1) * -2.0)
        value = (radius * cos_of_24_bits((second >> 8).to(tl.int64))).to(tl.float32)
        tl.store(out_ptr + index, value, mask=inside)
    else:
        tl.store(out_ptr + index, first.to(tl.int64), mask=inside)
