"""Functions of one element that several kernels need, to fp32's relative precision."""

import triton
import triton.language as tl

# The hardware has exp2; exp(x) is exp2(x * LOG2_E).
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def log1p(u):
    """Compute log(1 + u) for u >= 0 to fp32's relative precision.

    The hardware's logarithm does not have it near 1.
    2 artanh(u / (2 + u)); for u < 1/2 the terms left out are below 1e-8 relative.
    """
    ratio = u / (2.0 + u)
    square = ratio * ratio
    # Horner's scheme, highest order first.
    series = 1.0 / 9.0 + square * (1.0 / 11.0)
    series = 1.0 / 5.0 + square * (1.0 / 7.0 + square * series)
    series = 1.0 + square * (1.0 / 3.0 + square * series)
    return tl.where(u < 0.5, 2.0 * ratio * series, tl.log(1.0 + u))


@triton.jit
def softplus_and_sigmoid(x):
    """Compute log(1 + e^x) and its slope; both keep relative precision where they are near 0."""
    # The exponent is never positive, so nothing overflows.
    decay = tl.exp2(tl.abs(x) * (-LOG2_E))
    softplus = tl.maximum(x, 0.0) + log1p(decay)
    sigmoid = tl.where(x < 0.0, decay, 1.0) / (1.0 + decay)
    return softplus, sigmoid
