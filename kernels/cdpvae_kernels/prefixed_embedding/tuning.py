"""How the kernels of the packed gather are compiled ahead of time and tuned."""

from __future__ import annotations

import torch

from cdpvae_kernels.common.packing import search_steps
from cdpvae_kernels.common.tuning import POINTERS, Shapes, Specialization, Tunable
from cdpvae_kernels.prefixed_embedding.triton_kernels import pack_kernel, unprefix_kernel
from cdpvae_kernels.prefixed_embedding.triton_launch import pack, unprefix


def specializations() -> dict[str, Specialization]:
    """Describe both kernels for P=32, D=4096, in bf16 and in fp32."""
    out = {}
    for dtype in (torch.bfloat16, torch.float32):
        pointer, name = POINTERS[dtype], POINTERS[dtype].strip("*")
        # The kernel of the forward pass.
        out[f"prefixed_embedding.pack {name}"] = Specialization(
            pack_kernel,
            "prefixed_embedding.pack",
            {
                "embedding_ptr": pointer,
                "ids_ptr": "*i64",
                "cu_seqlens_ptr": "*i32",
                "prompts_ptr": pointer,
                "packed_ptr": pointer,
                "num_positions": "i32",
                "num_sequences": "i32",
                "num_prompts": "i32",
                "vocab": "i32",
                "width": "i32",
            },
            {"STEPS": search_steps(8)},
            ("embedding_ptr", "prompts_ptr", "packed_ptr", "num_prompts", "vocab", "width"),
        )

        # The kernel of the backward pass.
        out[f"prefixed_embedding.unprefix {name}"] = Specialization(
            unprefix_kernel,
            "prefixed_embedding.unprefix",
            {
                "grad_ptr": pointer,
                "cu_seqlens_ptr": "*i32",
                "grad_prompts_ptr": pointer,
                "total_prompts": "i32",
                "num_prompts": "i32",
                "width": "i32",
            },
            aligned=("grad_ptr", "grad_prompts_ptr", "num_prompts", "width"),
        )
    return out


def tunables(shapes: Shapes, device: torch.device) -> list[Tunable]:
    """Make both kernels ready to run on `shapes.tokens` ids in eight sequences with prompts."""
    # A vocabulary large enough that the embeddings do not all lie in the cache.
    sequences, width, dtype = 8, shapes.width, shapes.dtype
    embedding = torch.zeros(min(shapes.vocab, 32768), width, dtype=dtype, device=device)
    prompts = torch.zeros(sequences, shapes.prompts, width, dtype=dtype, device=device)
    ids = torch.randint(embedding.shape[0], (shapes.tokens,), device=device)
    cuts = torch.arange(sequences + 1, device=device) * shapes.tokens // sequences
    cu_seqlens = cuts.to(torch.int32)
    num_positions = shapes.tokens + sequences * shapes.prompts
    grad = torch.zeros(num_positions, width, dtype=dtype, device=device)

    # Both copy, so both have the same candidates.
    # Blocks from one position and a part of its width to several whole positions.
    candidates = {
        "BLOCK_R": (1, 2, 4, 8),
        "BLOCK_D": (512, 1024, 2048, 4096),
        "num_warps": (2, 4, 8),
        "num_stages": (1,),
    }
    names = {"pack": "prefixed_embedding.pack", "unprefix": "prefixed_embedding.unprefix"}
    return [
        Tunable(
            names["pack"],
            candidates,
            lambda config: pack(embedding, ids, cu_seqlens, prompts, {names["pack"]: config}),
            2 * num_positions * width * embedding.itemsize,
        ),
        Tunable(
            names["unprefix"],
            candidates,
            lambda config: unprefix(grad, cu_seqlens, shapes.prompts, {names["unprefix"]: config}),
            2 * sequences * shapes.prompts * width * grad.itemsize,
        ),
    ]
