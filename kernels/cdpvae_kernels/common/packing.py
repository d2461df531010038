"""Where a packed position belongs: sequences end to end, offsets (B+1,) int32.

`triton_packing.py` finds the same within a kernel.
"""

import torch
from torch import Tensor


def sequence_of(positions: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Find the sequence, (N,) int64, to which each packed position (N,) int64 belongs."""
    return torch.searchsorted(cu_seqlens[1:].to(torch.int64), positions, right=True)


def search_steps(num_sequences: int) -> int:
    """Count the halvings that leave one of `num_sequences` + 1 answers."""
    return num_sequences.bit_length()
