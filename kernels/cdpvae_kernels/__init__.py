"""The operations of the soft-prompt VAE that are worth a kernel, behind one function each.

The package needs torch, and Triton on a GPU; it knows nothing of `cdpvae`: anyone can use it on
its own.

Each operation has a folder. `op.py` holds the public function, which checks its arguments once, so
that an implementation receives only valid ones, and takes `impl` (`None` picks by device).
`reference.py` defines the operation in plain PyTorch: the CPU path and the oracle of the others.
`tiled.py`, where there is one, is the fast path of CPUs. `triton_kernels.py` holds the kernels for
GPUs, `triton_launch.py` what launches them, `tuning.py` what compiles and tunes them ahead of time.
The folder `common/` holds what operations share.

    from cdpvae_kernels import linear_cross_entropy
    loss = linear_cross_entropy(hidden, lm_head.weight, targets, positions=target_positions)
"""

from cdpvae_kernels import philox
from cdpvae_kernels.bag_of_words import bow_bce, bow_categorical
from cdpvae_kernels.common.checks import check_range, has_values
from cdpvae_kernels.common.dispatch import describe
from cdpvae_kernels.linear_cross_entropy import Stats, linear_cross_entropy
from cdpvae_kernels.philox import Stream
from cdpvae_kernels.prefixed_embedding import (
    prefixed_embedding,
    prefixed_positions,
    prefixed_rows,
)
from cdpvae_kernels.word_dropout import word_dropout

__all__ = [
    "Stats",
    "Stream",
    "bow_bce",
    "bow_categorical",
    "check_range",
    "describe",
    "has_values",
    "linear_cross_entropy",
    "philox",
    "prefixed_embedding",
    "prefixed_positions",
    "prefixed_rows",
    "word_dropout",
]
