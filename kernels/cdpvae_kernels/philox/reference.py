"""The definition of the draws in plain PyTorch: Philox4x32-10, and the normal made of its words.

Words are held in int64 tensors, because torch has no full uint32 arithmetic.
"""

import math

import torch
from torch import Tensor

# The paper's constants: rounds, multipliers of the counters, steps of the key.
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
MASK32 = 0xFFFFFFFF
# The epoch's share of the fourth counter; the stream has the other 8 bits.
EPOCH_BITS = 24

# Horner's coefficients of the normal draw, highest order first: artanh(r) / r, cos and sin(a) / a.
LOG_SERIES = tuple(1.0 / odd for odd in range(23, 0, -2))
COSINE_SERIES = tuple((-1.0) ** n / math.factorial(2 * n) for n in range(8, -1, -1))
SINE_SERIES = tuple((-1.0) ** n / math.factorial(2 * n + 1) for n in range(8, -1, -1))
# Radians of one 2^-24 of a turn.
ANGLE_OF_TURN = 2.0 * math.pi / 2.0**24


def philox4x32(
    key: tuple[int, int], counters: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Apply the block function, ten rounds: a key of two uint32 words to counters of four.

    Counters are int64 tensors that broadcast; so is the result, four words.
    """
    k0, k1 = key
    c0, c1, c2, c3 = counters
    for _ in range(ROUNDS):
        high0, low0 = _multiply32(c0, MULTIPLIERS[0])
        high1, low1 = _multiply32(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & MASK32, (k1 + KEY_STEPS[1]) & MASK32
    return c0, c1, c2, c3


def _multiply32(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """Return the high and the low 32 bits of a product of two uint32."""
    # The 64-bit product would overflow int64; with the multiplier in 16-bit halves every partial
    # result stays below 2^49.
    low = word * (multiplier & 0xFFFF)
    middle = word * (multiplier >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def draw(
    sample: Tensor,
    epoch: Tensor,
    position: Tensor,
    seed: int,
    stream: int,
    normal: bool,
) -> Tensor:
    """Draw the first words, int64, or normals, fp32, of the broadcast shape.

    sample, epoch, position: int64 tensors that broadcast against one another.
    seed: the 64 bits as a signed integer, see `signed_64`.
    stream: in [0, 256).
    normal: whether to return normals.
    """
    # The fields of the draw's name, cut into words of 32 bits.
    key = (seed & MASK32, (seed >> 32) & MASK32)
    counters = (position, sample & MASK32, sample >> 32, epoch | (stream << EPOCH_BITS))
    first, second = philox4x32(key, counters)[:2]
    if not normal:
        return first
    # Box and Muller: a radius from the first word, an angle from the second.
    radius = (log_of_24_bits((first >> 8) + 1) * -2.0).sqrt()
    return (radius * cos_of_24_bits(second >> 8)).to(torch.float32)


def log_of_24_bits(numerator: Tensor) -> Tensor:
    """Compute ln(numerator / 2^24) in fp64 for integers 1 ... 2^24; exactly 0 at 2^24.

    ln m = 2 artanh((m - 1) / (m + 1)) with m in [sqrt(1/2), sqrt(2)); the terms left out are
    below 1e-19 relative.
    """
    # numerator = mantissa * 2^exponent, with the mantissa brought around 1.
    mantissa, exponent = torch.frexp(numerator.to(torch.float64))
    small = mantissa < math.sqrt(0.5)
    mantissa = torch.where(small, mantissa * 2.0, mantissa)
    exponent = exponent - small.to(exponent.dtype) - 24
    # artanh's series, summed by Horner's scheme.
    ratio = (mantissa - 1.0) / (mantissa + 1.0)
    square = ratio * ratio
    series = torch.zeros_like(square)
    for coefficient in LOG_SERIES:
        series = series * square + coefficient
    return ratio * series * 2.0 + exponent.to(torch.float64) * math.log(2.0)


def cos_of_24_bits(turn: Tensor) -> Tensor:
    """Compute cos(2 pi turn / 2^24) in fp64 for integers 0 ... 2^24 - 1.

    The nearest quarter turn is taken off in integers, exactly; Taylor on [-pi/4, pi/4] to 1e-17.
    """
    # What is left after the nearest quarter turn is small enough for the series.
    quarter = (turn + (1 << 21)) >> 22
    angle = (turn - (quarter << 22)).to(torch.float64) * ANGLE_OF_TURN
    square = angle * angle
    cosine = torch.zeros_like(angle)
    sine = torch.zeros_like(angle)
    for of_cosine, of_sine in zip(COSINE_SERIES, SINE_SERIES, strict=True):
        cosine = cosine * square + of_cosine
        sine = sine * square + of_sine
    magnitude = torch.where(quarter % 2 == 0, cosine, sine * angle)
    # Quarter turns 0 ... 4 give cos, -sin, -cos, sin, cos.
    return torch.where((quarter % 4 == 1) | (quarter % 4 == 2), -magnitude, magnitude)
