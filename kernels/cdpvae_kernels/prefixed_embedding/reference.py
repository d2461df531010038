"""The definition of the packed gather in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cdpvae_kernels.common.packing import sequence_of


def prefixed_rows(rows: Tensor, cu_seqlens: Tensor, num_prompts: int) -> Tensor:
    """See `prefixed_embedding.prefixed_rows`."""
    return rows + num_prompts * (sequence_of(rows, cu_seqlens) + 1)


def prefixed_embedding(
    embedding: Tensor, ids: Tensor, cu_seqlens: Tensor, prompts: Tensor
) -> tuple[Tensor, Tensor]:
    """See `prefixed_embedding.prefixed_embedding`."""
    batch, num_prompts, width = prompts.shape
    sequences = torch.arange(batch + 1, device=cu_seqlens.device, dtype=torch.int32)
    packed_cu = cu_seqlens + num_prompts * sequences
    tokens = torch.arange(ids.numel(), device=ids.device)
    token_rows = prefixed_rows(tokens, cu_seqlens, num_prompts)
    offsets = torch.arange(num_prompts, device=prompts.device)
    prompt_rows = (packed_cu[:-1, None].to(torch.int64) + offsets).flatten()
    packed = prompts.new_empty(ids.numel() + batch * num_prompts, width)
    # Prompts last: under a frozen embedding their gradient is a gather and copies nothing else.
    packed.index_copy_(0, token_rows, F.embedding(ids, embedding))
    packed.index_copy_(0, prompt_rows, prompts.reshape(batch * num_prompts, width))
    return packed, packed_cu
