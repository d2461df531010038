"""Soft prompts and token embeddings written straight to their packed places.

Legend: B sequences, T packed tokens, P prompts, D hidden.

Every output row finds by itself what it holds: bisection in the offsets gives its sequence and its
place there, the first P places are prompts, the rest embedding rows. So nothing is concatenated and
each row is read and written once. Floor in bf16 at T + B*P = 8,448, D = 4,096: 69 MB read and 69 MB
written, 160 us on an L40S, where an embedding followed by `torch.cat` moves twice that.

    pack       prompts, embedding, ids -> packed (T + B*P, D)
    unprefix   gradient of the packed rows -> gradient of the prompts (B, P, D): a copy, no sum
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cdpvae_kernels.launch_configs import LaunchConfig
from cdpvae_kernels.triton_kernels.packing import search_steps, sequence_of
from cdpvae_kernels.triton_kernels.runtime import (
    POINTERS,
    Shapes,
    Specialization,
    Tunable,
    configuration,
)


@triton.jit
def pack_kernel(
    embedding_ptr,
    ids_ptr,
    cu_seqlens_ptr,
    prompts_ptr,
    packed_ptr,
    num_rows,
    num_sequences,
    num_prompts,
    width,
    STEPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (blocks of packed rows, blocks of the width)."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < num_rows
    sequence = sequence_of(
        tl.where(inside, row, 0), cu_seqlens_ptr, num_sequences, num_prompts, STEPS
    )
    place = row - tl.load(cu_seqlens_ptr + sequence) - sequence * num_prompts
    is_prompt = inside & (place < num_prompts)
    is_token = inside & (place >= num_prompts)
    token = row - (sequence + 1) * num_prompts
    token_id = tl.load(ids_ptr + token, mask=is_token, other=0).to(tl.int64)
    prompt = sequence.to(tl.int64) * num_prompts + place

    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    used = (column < width)[None, :]
    prompts = tl.load(
        prompts_ptr + prompt[:, None] * width + column[None, :],
        mask=is_prompt[:, None] & used,
        other=0.0,
    )
    tokens = tl.load(
        embedding_ptr + token_id[:, None] * width + column[None, :],
        mask=is_token[:, None] & used,
        other=0.0,
    )
    tl.store(
        packed_ptr + row.to(tl.int64)[:, None] * width + column[None, :],
        tl.where(is_prompt[:, None], prompts, tokens),
        mask=inside[:, None] & used,
    )


@triton.jit
def unprefix_kernel(
    grad_ptr,
    cu_seqlens_ptr,
    grad_prompts_ptr,
    num_rows,
    num_prompts,
    width,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (blocks of the B*P prompts, blocks of the width)."""
    prompt = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = prompt < num_rows
    sequence = prompt // num_prompts
    start = tl.load(cu_seqlens_ptr + sequence, mask=inside, other=0)
    row = start.to(tl.int64) + prompt
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (column < width)[None, :]
    grad = tl.load(grad_ptr + row[:, None] * width + column[None, :], mask=mask)
    target = prompt.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(grad_prompts_ptr + target, grad, mask=mask)


def pack(
    embedding: Tensor,
    ids: Tensor,
    cu_seqlens: Tensor,
    prompts: Tensor,
    configs: dict[str, LaunchConfig] | None = None,
) -> Tensor:
    """-> (T + B*P, D). configs: another table's entries, for tests and tuning."""
    batch, num_prompts, width = prompts.shape
    num_rows = ids.numel() + batch * num_prompts
    packed = torch.empty(num_rows, width, dtype=prompts.dtype, device=prompts.device)
    if packed.numel() == 0:
        return packed
    config = configuration("prefixed_embedding.pack", packed.device, configs, BLOCK_D=width)
    pack_kernel[_grid(num_rows, width, config)](
        embedding.contiguous(),
        ids.contiguous(),
        cu_seqlens.contiguous(),
        prompts.contiguous(),
        packed,
        num_rows,
        batch,
        num_prompts,
        width,
        STEPS=search_steps(batch),
        **config,
    )
    return packed


def unprefix(
    grad: Tensor,
    cu_seqlens: Tensor,
    num_prompts: int,
    configs: dict[str, LaunchConfig] | None = None,
) -> Tensor:
    """Gradient (T + B*P, D) -> that of the prompts (B, P, D)."""
    batch, width = cu_seqlens.numel() - 1, grad.shape[1]
    grad_prompts = torch.empty(batch, num_prompts, width, dtype=grad.dtype, device=grad.device)
    if grad_prompts.numel() == 0:
        return grad_prompts
    config = configuration("prefixed_embedding.unprefix", grad.device, configs, BLOCK_D=width)
    num_rows = batch * num_prompts
    unprefix_kernel[_grid(num_rows, width, config)](
        grad.contiguous(),
        cu_seqlens.contiguous(),
        grad_prompts,
        num_rows,
        num_prompts,
        width,
        **config,
    )
    return grad_prompts


def _grid(rows: int, width: int, config: LaunchConfig) -> tuple[int, int]:
    return triton.cdiv(rows, config["BLOCK_R"]), triton.cdiv(width, config["BLOCK_D"])


def specializations() -> dict[str, Specialization]:
    """P=32, D=4096."""
    out = {}
    for dtype in (torch.bfloat16, torch.float32):
        pointer, name = POINTERS[dtype], POINTERS[dtype].strip("*")
        sizes = dict.fromkeys(("num_rows", "num_sequences", "num_prompts", "width"), "i32")
        out[f"prefixed_embedding.pack {name}"] = Specialization(
            pack_kernel,
            "prefixed_embedding.pack",
            {
                "embedding_ptr": pointer,
                "ids_ptr": "*i64",
                "cu_seqlens_ptr": "*i32",
                "prompts_ptr": pointer,
                "packed_ptr": pointer,
                **sizes,
            },
            {"STEPS": search_steps(8)},
            ("embedding_ptr", "prompts_ptr", "packed_ptr", "num_prompts", "width"),
        )
        sizes.pop("num_sequences")
        out[f"prefixed_embedding.unprefix {name}"] = Specialization(
            unprefix_kernel,
            "prefixed_embedding.unprefix",
            {
                "grad_ptr": pointer,
                "cu_seqlens_ptr": "*i32",
                "grad_prompts_ptr": pointer,
                **sizes,
            },
            aligned=("grad_ptr", "grad_prompts_ptr", "num_prompts", "width"),
        )
    return out


def tunables(shapes: Shapes, device: torch.device) -> list[Tunable]:
    """`shapes.tokens` ids in eight sequences, each with its prompts."""
    sequences, width = 8, shapes.width
    draw = {"dtype": shapes.dtype, "device": device}
    # A vocabulary large enough that the rows do not all lie in the cache.
    embedding = torch.zeros(min(shapes.vocab, 32768), width, **draw)
    prompts = torch.zeros(sequences, shapes.prompts, width, **draw)
    ids = torch.randint(embedding.shape[0], (shapes.tokens,), device=device)
    cuts = torch.arange(sequences + 1, device=device) * shapes.tokens // sequences
    cu_seqlens = cuts.to(torch.int32)
    num_rows = shapes.tokens + sequences * shapes.prompts
    grad = torch.zeros(num_rows, width, **draw)
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
            2 * num_rows * width * embedding.itemsize,
        ),
        Tunable(
            names["unprefix"],
            candidates,
            lambda config: unprefix(grad, cu_seqlens, shapes.prompts, {names["unprefix"]: config}),
            2 * sequences * shapes.prompts * width * grad.itemsize,
        ),
    ]
