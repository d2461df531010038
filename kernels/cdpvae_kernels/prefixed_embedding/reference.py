"""The definition of the packed gather in plain PyTorch: the CPU path and the kernel's oracle.

Shapes: `B` sequences, `T` packed tokens, `N` positions, `V` vocabulary, `D` hidden, `P` prompts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cdpvae_kernels.common.packing import sequence_of


def prefixed_positions(positions: Tensor, cu_seqlens: Tensor, num_prompts: int) -> Tensor:
    """Add to each position (N,) int64 the prompts of its own and of all earlier sequences."""
    return positions + num_prompts * (sequence_of(positions, cu_seqlens) + 1)


def prefixed_embedding(
    embedding: Tensor,
    ids: Tensor,
    cu_seqlens: Tensor,
    prompts: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write embeddings and prompts to their places; arguments and result as the public function's.

    embedding (V, D): float.
    ids (T,): int64 or int32.
    cu_seqlens (B+1,): int32.
    prompts (B, P, D): in the dtype of `embedding`.
    """
    # Find the places of tokens and prompts in the packed output.
    batch, num_prompts, width = prompts.shape
    sequences = torch.arange(batch + 1, device=cu_seqlens.device, dtype=torch.int32)
    packed_cu = cu_seqlens + num_prompts * sequences
    tokens = torch.arange(ids.numel(), device=ids.device)
    token_positions = prefixed_positions(tokens, cu_seqlens, num_prompts)
    offsets = torch.arange(num_prompts, device=prompts.device)
    prompt_positions = (packed_cu[:-1, None].to(torch.int64) + offsets).flatten()

    # Prompts last: under a frozen embedding their gradient is a gather and copies nothing else.
    packed = prompts.new_empty(ids.numel() + batch * num_prompts, width)
    packed.index_copy_(0, token_positions, F.embedding(ids, embedding))
    packed.index_copy_(0, prompt_positions, prompts.reshape(batch * num_prompts, width))
    return packed, packed_cu
