"""The decoder's input: each sequence's soft prompts, then its embeddings, and who else builds it.

Shapes: `B` sequences, `T` packed tokens, `S` longest sequence, `D` hidden, `P` prompts,
`V` vocabulary. Differentiated in the prompts alone: the embedding is frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.rivals.operation import (
    BOTH,
    FORWARD,
    Operation,
    Shape,
    Work,
    copy_of,
    even_offsets,
    rows_of,
)
from cdpvae_kernels import prefixed_embedding

# What padded ids hold where a sequence has ended.
PAD = 0


@dataclass(frozen=True)
class Inputs:
    """embedding (V, D), ids (T,), cu_seqlens (B+1,), prompts (B, P, D), padded_ids (B, S)."""

    embedding: Tensor
    ids: Tensor
    cu_seqlens: Tensor
    prompts: Tensor
    padded_ids: Tensor
    # (T + B*P, D). With sequences of equal length the padded output has as many elements.
    upstream: Tensor

    @property
    def wanted(self) -> tuple[Tensor, ...]:
        """See `operation.Inputs`."""
        return (self.prompts,)


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Draw random data; only the prompts require a gradient."""
    draw = torch.Generator(device).manual_seed(seed)
    tokens, width, vocab = (int(shape[name]) for name in ("tokens", "hidden", "vocab"))
    batch, num_prompts = int(shape["batch"]), int(shape["prompts"])

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=draw, dtype=dtype)

    ids = torch.randint(0, vocab, (tokens,), device=device, generator=draw)
    offsets = even_offsets(batch, tokens, device)
    return Inputs(
        normal(vocab, width),
        ids,
        offsets,
        normal(batch, num_prompts, width).requires_grad_(),
        rows_of(ids, offsets, PAD),
        normal(tokens + batch * num_prompts, width),
    )


def ours(i: Inputs) -> Tensor:
    """Take what the device gets by itself."""
    return prefixed_embedding(i.embedding, i.ids, i.cu_seqlens, i.prompts)[0]


def reference(i: Inputs) -> Tensor:
    """Take the plain PyTorch that defines ours: what runs on a CPU."""
    return prefixed_embedding(i.embedding, i.ids, i.cu_seqlens, i.prompts, impl="reference")[0]


def description(i: Inputs) -> Tensor:
    """Take the description literally, (B, P + S, D): embed padded ids, put the prompts before."""
    return torch.cat([i.prompts, F.embedding(i.padded_ids, i.embedding)], dim=1)


def eager(i: Inputs) -> Tensor:
    """Pack as one writes it: a list of prompts and texts in turn, put end to end.

    The lengths come from the device, so on a GPU the host waits.
    """
    # Each sequence's prompts, then its text.
    texts = F.embedding(i.ids, i.embedding).split(i.cu_seqlens.diff().tolist())
    return torch.cat([part for pair in zip(i.prompts, texts, strict=True) for part in pair])


def work(shape: Shape, of_pass: str, itemsize: int) -> Work:
    """Count the output read and written; backward the prompts' gradient read and written."""
    # Embeddings are frozen, so backward touches the prompts' places alone.
    prompts = shape["batch"] * shape["prompts"] * shape["hidden"]
    output = shape["tokens"] * shape["hidden"] + prompts
    moved = 2.0 * output + (2.0 * prompts if of_pass == BOTH else 0.0)
    return Work(0.0, moved * itemsize)


def floor(i: Inputs, of_pass: str) -> Callable[[], object]:
    """Copy as many bytes as the least work moves."""
    moved = 2 * i.upstream.nbytes + (2 * i.prompts.nbytes if of_pass == BOTH else 0)
    return copy_of(moved, i.ids.device)


def _shape(tokens: int, hidden: int, vocab: int) -> tuple[Shape, ...]:
    return ({"tokens": tokens, "batch": 8, "prompts": 32, "hidden": hidden, "vocab": vocab},)


OPERATION = Operation(
    name="prefixed_embedding",
    passes=(FORWARD, BOTH),
    shapes={
        ("cpu", "small"): _shape(1024, 128, 8192),
        ("cpu", "full"): _shape(8192, 4096, 32768),
        ("cuda", "small"): _shape(1024, 1024, 32768),
        ("cuda", "full"): _shape(8192, 4096, 128256),
    },
    inputs=inputs,
    variants={"ours": ours, "reference": reference, "description": description, "eager": eager},
    literal="description",
    work=work,
    floor=floor,
    floor_name="copy",
    short=True,
)
