"""Word dropout over packed ids in one launch.

A token finds its sequence by bisection in the offsets, draws the first Philox word of its
(sample, epoch, place in the sequence) and compares: integers only, so the decision has the bits of
`reference.word_dropout` in any packing. Floor: 2 x 8 bytes a token (64 KB at 4,096 tokens): the
launch itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cdpvae_kernels.launch_configs import LaunchConfig
from cdpvae_kernels.philox import Stream
from cdpvae_kernels.triton_kernels.packing import search_steps, sequence_of
from cdpvae_kernels.triton_kernels.philox import words
from cdpvae_kernels.triton_kernels.runtime import (
    POINTERS,
    Shapes,
    Specialization,
    Tunable,
    configuration,
)


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
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < num_tokens
    # Past the end the search answers "no sequence": token 0 stands in.
    sequence = sequence_of(tl.where(inside, token, 0), cu_seqlens_ptr, num_sequences, 0, STEPS)
    position = token - tl.load(cu_seqlens_ptr + sequence)
    sample = tl.load(sample_index_ptr + sequence)
    word, _, _, _ = words(seed, stream, sample, epoch, position)
    dropped = (word.to(tl.int64) < threshold) & (position > 0)
    token_id = tl.load(ids_ptr + token, mask=inside, other=0)
    kept = tl.where(dropped, fill_id.to(token_id.dtype), token_id)
    tl.store(out_ptr + token, kept, mask=inside)


def word_dropout(
    ids: Tensor,
    cu_seqlens: Tensor,
    sample_index: Tensor,
    threshold: int,
    fill_id: int,
    seed: int,
    epoch: int,
    configs: dict[str, LaunchConfig] | None = None,
) -> Tensor:
    """As `reference.word_dropout`, but seed: the 64 bits as a signed integer.

    configs: another table's entries, for tests and tuning.
    """
    ids = ids.contiguous()
    out = torch.empty_like(ids)
    if ids.numel() == 0:
        return out
    config = configuration("word_dropout.drop", ids.device, configs, BLOCK=ids.numel())
    num_sequences = sample_index.numel()
    drop_kernel[(triton.cdiv(ids.numel(), config["BLOCK"]),)](
        ids,
        cu_seqlens.contiguous(),
        sample_index.contiguous(),
        out,
        ids.numel(),
        num_sequences,
        threshold,
        fill_id,
        seed,
        int(Stream.WORD_DROPOUT),
        epoch,
        STEPS=search_steps(num_sequences),
        **config,
    )
    return out


def specializations() -> dict[str, Specialization]:
    out = {}
    for dtype in (torch.int64, torch.int32):
        pointer = POINTERS[dtype]
        out[f"word_dropout.drop {pointer.strip('*')}"] = Specialization(
            drop_kernel,
            "word_dropout.drop",
            {
                "ids_ptr": pointer,
                "cu_seqlens_ptr": "*i32",
                "sample_index_ptr": "*i64",
                "out_ptr": pointer,
                "num_tokens": "i32",
                "num_sequences": "i32",
                "threshold": "i64",
                "fill_id": "i32",
                "seed": "i64",
                "stream": "i32",
                "epoch": "i32",
            },
            {"STEPS": search_steps(8)},
            ("ids_ptr", "out_ptr"),
        )
    return out


def tunables(shapes: Shapes, device: torch.device) -> list[Tunable]:
    """`shapes.tokens` ids in eight sequences."""
    name, sequences = "word_dropout.drop", 8
    ids = torch.zeros(shapes.tokens, dtype=torch.int64, device=device)
    sample = torch.arange(sequences, device=device)
    cuts = torch.arange(sequences + 1, device=device) * shapes.tokens // sequences
    arguments = (ids, cuts.to(torch.int32), sample, 1 << 30, 1, 7, 0)
    return [
        Tunable(
            name,
            {"BLOCK": (64, 128, 256, 512), "num_warps": (1, 2, 4, 8), "num_stages": (1,)},
            lambda config: word_dropout(*arguments, {name: config}),
            shapes.tokens * 16,
        )
    ]
