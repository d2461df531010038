"""Random numbers that are a pure function of what they are for (Philox4x32-10)."""

from cdpvae_kernels.philox.op import (
    EPOCH_LIMIT,
    SAMPLE_LIMIT,
    SEED_LIMIT,
    Stream,
    bits,
    in_range,
    normal,
    signed_64,
    uniform,
)
from cdpvae_kernels.philox.reference import philox4x32

__all__ = [
    "EPOCH_LIMIT",
    "SAMPLE_LIMIT",
    "SEED_LIMIT",
    "Stream",
    "bits",
    "in_range",
    "normal",
    "philox4x32",
    "signed_64",
    "uniform",
]
