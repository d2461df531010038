"""Random numbers that are a pure function of what they are for (Philox4x32-10).

A draw is named by (seed, stream, sample index, epoch, position) and has no state, so it is the same
under recomputation, on any number of ranks, in any packing and after a resume. The 64-bit key is
the seed; the four 32-bit counters are (position, sample index low, sample index high,
epoch | stream << 24). One draw uses one counter block.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

Every step is integer arithmetic or an IEEE operation on one element (no library log or cos, whose
bits depend on whether the vectorised or the scalar routine ran), so a draw has the same bits in any
shape and layout and can be reproduced on another device.
"""

import math
from collections.abc import Mapping
from enum import IntEnum

import torch
from torch import Tensor

from cdpvae_kernels.checks import INTEGERS, check_range
from cdpvae_kernels.dispatch import choose

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
MASK32 = 0xFFFFFFFF
EPOCH_BITS = 24


class Stream(IntEnum):
    """What a draw is for. The values are part of the definition: never renumber one."""

    NOISE = 0  # posterior noise; position is the latent dimension
    WORD_DROPOUT = 1  # position is the token's place in its sequence
    AUGMENT_SPAN = 2
    AUGMENT_WORD = 3
    AUGMENT_SHUFFLE = 4
    PRIOR = 5  # z ~ p(z)
    SAMPLING = 6  # next-token draws in generation
    STEP = 7  # decisions of a whole optimizer step; sample index is the step


def bits(
    seed: int,
    stream: int,
    sample_index: Tensor | int,
    epoch: Tensor | int,
    position: Tensor | int,
    *,
    impl: str | None = None,
) -> Tensor:
    """Uniform 32-bit integers.

    seed: in [0, 2^64). stream: a `Stream`, in [0, 256). sample_index: in [0, 2^63).
    epoch: in [0, 2^24). position: in [0, 2^32). The last three are ints or int32/int64 tensors
    and broadcast against one another.
    Returns int64 of the broadcast shape, values in [0, 2^32).
    Raises ValueError for a value outside its range (tensors: only where readable on the CPU).
    """
    key, counters = _key_and_counters(seed, stream, sample_index, epoch, position)
    words = choose("philox.bits", impl, counters[0].device, _IMPLEMENTATIONS)
    return words(key, counters)[0]


def uniform(
    seed: int,
    stream: int,
    sample_index: Tensor | int,
    epoch: Tensor | int,
    position: Tensor | int,
    *,
    impl: str | None = None,
) -> Tensor:
    """fp32 in [0, 1), multiples of 2^-24: the upper 24 bits of `bits` of the same arguments."""
    word = bits(seed, stream, sample_index, epoch, position, impl=impl)
    return (word >> 8).to(torch.float32) * 2.0**-24


def normal(
    seed: int,
    stream: int,
    sample_index: Tensor | int,
    epoch: Tensor | int,
    position: Tensor | int,
    *,
    impl: str | None = None,
) -> Tensor:
    """fp32 standard normal, by Box and Muller from the first two words of the counter block.

    sqrt(-2 ln((a + 1) / 2^24)) * cos(2 pi b / 2^24) with a, b the words' upper 24 bits, evaluated
    in fp64 and rounded once; |value| < 5.77. Arguments and errors as for `bits`.
    """
    key, counters = _key_and_counters(seed, stream, sample_index, epoch, position)
    words = choose("philox.normal", impl, counters[0].device, _IMPLEMENTATIONS)
    first, second = words(key, counters)[:2]
    radius = (_log_of_24_bits((first >> 8) + 1) * -2.0).sqrt()
    return (radius * _cos_of_24_bits(second >> 8)).to(torch.float32)


def philox4x32(
    key: tuple[int, int], counters: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The block function, ten rounds: key of two uint32 words, counters and result of four.

    Words are held in int64 tensors (broadcastable), because torch has no full uint32 arithmetic.
    """
    k0, k1 = key
    c0, c1, c2, c3 = counters
    for _ in range(ROUNDS):
        high0, low0 = _multiply32(c0, MULTIPLIERS[0])
        high1, low1 = _multiply32(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & MASK32, (k1 + KEY_STEPS[1]) & MASK32
    return c0, c1, c2, c3


_IMPLEMENTATIONS = {"reference": philox4x32}


def _multiply32(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    # The 64-bit product would overflow int64; with the multiplier in 16-bit halves every partial
    # result stays below 2^49.
    low = word * (multiplier & 0xFFFF)
    middle = word * (multiplier >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def _key_and_counters(seed, stream, sample_index, epoch, position):
    key_seed = _in_range("seed", seed, 1 << 64)
    stream_tag = _in_range("stream", stream, 1 << 8) << EPOCH_BITS
    limits: Mapping[str, tuple[Tensor | int, int]] = {
        "sample_index": (sample_index, 1 << 63),
        "epoch": (epoch, 1 << EPOCH_BITS),
        "position": (position, 1 << 32),
    }
    device = next((v.device for v, _ in limits.values() if isinstance(v, Tensor)), None)
    sample, epoch, position = (
        _as_int64(name, value, limit, device) for name, (value, limit) in limits.items()
    )
    counters = (position, sample & MASK32, sample >> 32, epoch | stream_tag)
    return (key_seed & MASK32, key_seed >> 32), counters


def _in_range(name: str, value: int, limit: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
        raise ValueError(f"{name}={value!r}; it must be an integer in [0, {limit})")
    return int(value)


def _as_int64(name: str, value: Tensor | int, limit: int, device: torch.device | None) -> Tensor:
    if not isinstance(value, Tensor):
        # Filled, not copied: a copy from the host would wait for a GPU.
        return torch.full((), _in_range(name, value, limit), dtype=torch.int64, device=device)
    if value.dtype not in INTEGERS:
        raise ValueError(f"{name} has dtype {value.dtype}; it must be torch.int64 or torch.int32")
    check_range(name, value, 0, limit)
    return value.to(torch.int64)


def _log_of_24_bits(numerator: Tensor) -> Tensor:
    """ln(numerator / 2^24) in fp64 for integers 1 ... 2^24; exactly 0 at 2^24.

    ln m = 2 artanh((m - 1) / (m + 1)) with m in [sqrt(1/2), sqrt(2)); the terms left out are
    below 1e-19 relative.
    """
    mantissa, exponent = torch.frexp(numerator.to(torch.float64))
    small = mantissa < math.sqrt(0.5)
    mantissa = torch.where(small, mantissa * 2.0, mantissa)
    exponent = exponent - small.to(exponent.dtype) - 24
    ratio = (mantissa - 1.0) / (mantissa + 1.0)
    square = ratio * ratio
    series = torch.zeros_like(square)
    for odd in range(23, 0, -2):
        series = series * square + 1.0 / odd
    return ratio * series * 2.0 + exponent.to(torch.float64) * math.log(2.0)


def _cos_of_24_bits(turn: Tensor) -> Tensor:
    """cos(2 pi turn / 2^24) in fp64 for integers 0 ... 2^24 - 1.

    The nearest quarter turn is taken off in integers, exactly; Taylor on [-pi/4, pi/4] to 1e-17.
    """
    quarter = (turn + (1 << 21)) >> 22
    angle = (turn - (quarter << 22)).to(torch.float64) * (2.0 * math.pi / 2.0**24)
    square = angle * angle
    cosine = torch.zeros_like(angle)
    sine = torch.zeros_like(angle)
    for order in range(8, -1, -1):
        sign = -1.0 if order % 2 else 1.0
        cosine = cosine * square + sign / math.factorial(2 * order)
        sine = sine * square + sign / math.factorial(2 * order + 1)
    magnitude = torch.where(quarter % 2 == 0, cosine, sine * angle)
    # Quarter turns 0 ... 4 give cos, -sin, -cos, sin, cos.
    return torch.where((quarter % 4 == 1) | (quarter % 4 == 2), -magnitude, magnitude)
