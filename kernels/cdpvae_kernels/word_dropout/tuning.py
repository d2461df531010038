"""How the kernel of word dropout is compiled ahead of time and tuned."""

from __future__ import annotations

import torch

from cdpvae_kernels.common.packing import search_steps
from cdpvae_kernels.common.tuning import POINTERS, Shapes, Specialization, Tunable
from cdpvae_kernels.word_dropout.triton_kernels import drop_kernel
from cdpvae_kernels.word_dropout.triton_launch import word_dropout


def specializations() -> dict[str, Specialization]:
    """Describe the kernel for int64 and for int32 ids."""
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
    """Make the kernel ready to run on `shapes.tokens` ids in eight sequences."""
    # Eight sequences of equal length, a rate of a quarter.
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
