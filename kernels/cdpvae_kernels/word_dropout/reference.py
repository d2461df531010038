"""The definition of word dropout in plain PyTorch."""

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
    """See `word_dropout.word_dropout`; threshold is floor(rate * 2^32)."""
    tokens = torch.arange(ids.numel(), device=ids.device)
    sequence = sequence_of(tokens, cu_seqlens)
    position = tokens - cu_seqlens.to(torch.int64)[sequence]
    word = philox.bits(
        seed, philox.Stream.WORD_DROPOUT, sample_index[sequence], epoch, position, impl="reference"
    )
    return ids.masked_fill((word < threshold) & (position > 0), fill_id)
