"""The kernel of word dropout over packed ids: one launch.

A token finds its sequence by bisection in the offsets, draws the first Philox word of its
(sample, epoch, place in the sequence) and compares: integers only, so the decision has the bits of
`reference.word_dropout` in any packing. Floor: 2 x 8 bytes a token (64 KB at 4,096 tokens): the
launch itself.
"""

import triton
import triton.language as tl

from cdpvae_kernels.common.triton_packing import sequence_of
from cdpvae_kernels.philox.triton_kernels import words


@triton.jit(do_not_specialize=["threshold", "fill_id", "seed", "epoch", "stream"])
def drop_kernel(
    ids_ptr,
    cu_seqlens_ptr,
    sample_index_ptr,
    out_ptr,
    num_tokens,
    num_sequences,
    threshold,
    fill_id,
    seed,
    stream,
    epoch,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write each id or, where its draw is below the threshold, fill_id. Grid: blocks of tokens."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < num_tokens
    # Past the end the search answers "no sequence": token 0 stands in.
    sequence = sequence_of(tl.where(inside, token, 0), cu_seqlens_ptr, num_sequences, 0, STEPS)
    # The draw's name: the place in the sequence and the sample, never the packing.
    position = token - tl.load(cu_seqlens_ptr + sequence)
    sample = tl.load(sample_index_ptr + sequence)
    word, _, _, _ = words(seed, stream, sample, epoch, position)
    # The first token of a sequence is never dropped.
    dropped = (word.to(tl.int64) < threshold) & (position > 0)
    token_id = tl.load(ids_ptr + token, mask=inside, other=0)
    kept = tl.where(dropped, fill_id.to(token_id.dtype), token_id)
    tl.store(out_ptr + token, kept, mask=inside)
