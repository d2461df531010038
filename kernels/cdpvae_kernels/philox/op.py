"""Random numbers that are a pure function of what they are for (Philox4x32-10).

A draw is named by (seed, stream, sample index, epoch, position) and has no state, so it is the same
under recomputation, on any number of ranks, in any packing and after a resume. The 64-bit key is
the seed; the four 32-bit counters are (position, sample index low, sample index high,
epoch | stream << 24). One draw uses one counter block.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

Every step is integer arithmetic or an IEEE operation on one element (no library log or cos, whose
bits depend on whether the vectorised or the scalar routine ran), so a draw has the same bits in any
shape and layout and can be reproduced on another device.

A GPU draws in one kernel, the operator `cdpvae_kernels::philox`, with the same bits.
"""

from collections.abc import Callable
from enum import IntEnum

import torch
from torch import Tensor

from cdpvae_kernels.common.checks import INTEGERS, check_range
from cdpvae_kernels.common.dispatch import choose, from_triton
from cdpvae_kernels.philox import reference
from cdpvae_kernels.philox.reference import EPOCH_BITS

# Each field's values are below its limit.
SEED_LIMIT = 1 << 64
EPOCH_LIMIT = 1 << EPOCH_BITS
SAMPLE_LIMIT = 1 << 63
POSITION_LIMIT = 1 << 32
STREAM_LIMIT = 1 << 8


class Stream(IntEnum):
    """What a draw is for. The values are part of the definition: never renumber one."""

    # Posterior noise; position is the latent dimension.
    NOISE = 0
    # Position is the token's place in its sequence.
    WORD_DROPOUT = 1
    # The augmentations of text: spans, words, and the order of tokens within windows.
    AUGMENT_SPAN = 2
    AUGMENT_WORD = 3
    AUGMENT_SHUFFLE = 4
    # z ~ p(z).
    PRIOR = 5
    # Next-token draws in generation.
    SAMPLING = 6
    # Decisions of a whole optimizer step; sample index is the step.
    STEP = 7


def bits(
    seed: int,
    stream: int,
    sample_index: Tensor | int,
    epoch: Tensor | int,
    position: Tensor | int,
    *,
    impl: str | None = None,
) -> Tensor:
    """Draw uniform 32-bit integers.

    seed: in [0, 2^64).
    stream: a `Stream`, in [0, 256).
    sample_index: in [0, 2^63).
    epoch: in [0, 2^24).
    position: in [0, 2^32).
    impl: "reference" or "triton"; None picks by device.

    sample_index, epoch and position are ints or int32/int64 tensors and broadcast against one
    another. Returns int64 of the broadcast shape, values in [0, 2^32).
    Raises ValueError for a value outside its range (tensors: only where readable on the CPU).
    """
    return _draw("philox.bits", seed, stream, sample_index, epoch, position, False, impl)


def uniform(
    seed: int,
    stream: int,
    sample_index: Tensor | int,
    epoch: Tensor | int,
    position: Tensor | int,
    *,
    impl: str | None = None,
) -> Tensor:
    """Draw fp32 in [0, 1), multiples of 2^-24: the upper 24 bits of `bits` of the same arguments.

    All arguments and errors as for `bits`.
    """
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
    """Draw fp32 standard normals, by Box and Muller from the first two words of the counter block.

    sqrt(-2 ln((a + 1) / 2^24)) * cos(2 pi b / 2^24) with a, b the words' upper 24 bits, evaluated
    in fp64 and rounded once; |value| < 5.77. All arguments and errors as for `bits`.
    """
    return _draw("philox.normal", seed, stream, sample_index, epoch, position, True, impl)


def signed_64(seed: int) -> int:
    """Return the signed integer with the bits of `seed`: what operators and kernels can take."""
    return seed - SEED_LIMIT if seed >= SEED_LIMIT // 2 else seed


def in_range(name: str, value: int, limit: int) -> int:
    """Return `value`. Raises ValueError unless it is an integer in [0, limit)."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
        raise ValueError(f"{name}={value!r}; it must be an integer in [0, {limit})")
    return int(value)


def _draw(
    op: str,
    seed: int,
    stream: int,
    sample_index: Tensor | int,
    epoch: Tensor | int,
    position: Tensor | int,
    normal: bool,
    impl: str | None,
) -> Tensor:
    """Check the arguments of `op`, then draw its words or normals."""
    # Refuse what does not fit into its field: it would change another field's draw.
    seed = in_range("seed", seed, SEED_LIMIT)
    stream = in_range("stream", stream, STREAM_LIMIT)
    counters = (sample_index, epoch, position)
    # Numbers go to the device of the tensors, or to the CPU where there is no tensor.
    device = next((v.device for v in counters if isinstance(v, Tensor)), None)
    sample = _as_int64("sample_index", sample_index, SAMPLE_LIMIT, device)
    epoch = _as_int64("epoch", epoch, EPOCH_LIMIT, device)
    position = _as_int64("position", position, POSITION_LIMIT, device)
    run = choose(op, impl, sample.device, _IMPLEMENTATIONS)
    return run(sample, epoch, position, signed_64(seed), stream, normal)


def _as_int64(name: str, value: Tensor | int, limit: int, device: torch.device | None) -> Tensor:
    """Return a counter as an int64 tensor. Raises ValueError for a wrong dtype or value."""
    if not isinstance(value, Tensor):
        # Filled, not copied: a copy from the host would wait for a GPU.
        return torch.full((), in_range(name, value, limit), dtype=torch.int64, device=device)
    if value.dtype not in INTEGERS:
        raise ValueError(f"{name} has dtype {value.dtype}; it must be torch.int64 or torch.int32")
    check_range(name, value, 0, limit)
    return value.to(torch.int64)


_triton_draw = from_triton("philox", "draw")


@torch.library.custom_op("cdpvae_kernels::philox", mutates_args=())
def _operator(
    sample: Tensor, epoch: Tensor, position: Tensor, seed: int, stream: int, normal: bool
) -> Tensor:
    return _triton_draw(sample, epoch, position, seed, stream, normal)


@_operator.register_fake
def _(
    sample: Tensor, epoch: Tensor, position: Tensor, seed: int, stream: int, normal: bool
) -> Tensor:
    shape = torch.broadcast_shapes(sample.shape, epoch.shape, position.shape)
    return position.new_empty(shape, dtype=torch.float32 if normal else torch.int64)


_IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "reference": reference.draw,
    "triton": _operator,
}
