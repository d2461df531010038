"""The definition of word dropout in plain PyTorch: the CPU path and the kernel's oracle.

Shapes: `B` sequences, `T` packed tokens.
"""

import torch
from torch import Tensor

from cdpvae_kernels import philox
from cdpvae_kernels.common.packing import sequence_of


def word_dropout(
    ids: Tensor,
    cu_seqlens: Tensor,
    sample_index: Tensor,
    threshold: int,
    fill_id: int,
    seed: int,
    epoch: int,
) -> Tensor:
    """Fill in `fill_id` where a token's draw is below the threshold.

    ids (T,): int64 or int32.
    cu_seqlens (B+1,): int32.
    sample_index (B,): int64.
    threshold: floor(rate * 2^32).
    fill_id, seed, epoch: as the public function takes them.
    """
    # Where each token is in its own sequence: the draw knows nothing of the packing.
    tokens = torch.arange(ids.numel(), device=ids.device)
    sequence = sequence_of(tokens, cu_seqlens)
    position = tokens - cu_seqlens.to(torch.int64)[sequence]
    # One draw per token; the first of a sequence is never dropped.
    word = philox.bits(
        seed, philox.Stream.WORD_DROPOUT, sample_index[sequence], epoch, position, impl="reference"
    )
    return ids.masked_fill((word < threshold) & (position > 0), fill_id)
