"""Where a packed position belongs, found within a kernel: bisection in the offsets (B+1,) int32."""

import triton
import triton.language as tl


@triton.jit
def sequence_of(position, cu_seqlens_ptr, num_sequences, spacing, STEPS: tl.constexpr):
    """Find the sequence of each position: count the offsets 1 ... B that are not above it.

    spacing: positions put before every sequence (its prompts); offset i then counts as
    cu_seqlens[i] + i * spacing. STEPS: `search_steps(num_sequences)`.
    """
    # Bisection; all positions of a block take the same number of steps.
    low = position * 0
    high = low + num_sequences
    for _ in range(STEPS):
        searching = low < high
        middle = (low + high) // 2
        offset = tl.load(cu_seqlens_ptr + middle + 1, mask=searching, other=0)
        above = offset + (middle + 1) * spacing > position
        low = tl.where(searching & ~above, middle + 1, low)
        high = tl.where(searching & above, middle, high)
    return low
