"""The decoder's packed input: each sequence's soft prompts, then its token embeddings.

Shapes: `B` sequences, `T` packed tokens, `N` positions, `V` vocabulary, `D` hidden, `P` prompts.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from cdpvae_kernels.common.autograd import OperatorContext
from cdpvae_kernels.common.checks import (
    FLOATS,
    INTEGERS,
    check_packing,
    check_range,
    check_tensor,
    readable,
)
from cdpvae_kernels.common.dispatch import choose, from_triton
from cdpvae_kernels.common.renamed import announce
from cdpvae_kernels.prefixed_embedding import reference

# Imported, and Triton with them, when they are first called.
_pack = from_triton("prefixed_embedding", "pack")
_unprefix = from_triton("prefixed_embedding", "unprefix")


def prefixed_embedding(
    embedding: Tensor,
    ids: Tensor,
    cu_seqlens: Tensor,
    prompts: Tensor,
    *,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Embed packed ids and put each sequence's prompts before them.

    embedding (V, D): float.
    ids (T,): int64 or int32, sequences end to end.
    cu_seqlens (B+1,): int32, where each sequence starts and the last one ends.
    prompts (B, P, D): in the dtype of `embedding`.
    impl: "reference" or "triton"; None picks by device.

    Returns ((T + B*P, D), (B+1,) int32): the packed input and its offsets.
    Differentiable in `prompts` and, if it requires a gradient, in `embedding`.
    Raises ValueError for wrong shapes or dtypes and for ids outside the vocabulary.
    """
    # Refuse what no implementation checks again.
    check_tensor("embedding", embedding, ("V", "D"), FLOATS)
    check_packing(ids, cu_seqlens)
    check_range("ids", ids, 0, embedding.shape[0])
    batch = cu_seqlens.numel() - 1
    check_tensor("prompts", prompts, (batch, "P", embedding.shape[1]), (embedding.dtype,))
    run = choose("prefixed_embedding", impl, prompts.device, _IMPLEMENTATIONS, prompts.dtype)
    return run(embedding, ids, cu_seqlens, prompts)


def prefixed_positions(positions: Tensor, cu_seqlens: Tensor, num_prompts: int) -> Tensor:
    """Map positions in `ids` to positions in the output of `prefixed_embedding`.

    positions: (N,) int64 or int32, each in [0, T). cu_seqlens: (B+1,) int32, of the ids without
    prompts. num_prompts: P, at least 0. Returns (N,) int64.
    Raises ValueError for wrong shapes or dtypes and for positions outside [0, T).
    """
    check_tensor("positions", positions, ("N",), INTEGERS)
    check_tensor("cu_seqlens", cu_seqlens, ("B+1",), (torch.int32,))
    if cu_seqlens.numel() == 0:
        raise ValueError("cu_seqlens is empty; it must hold B+1 offsets, the first of them 0")
    if num_prompts < 0:
        raise ValueError(f"num_prompts={num_prompts}; it must be at least 0")
    # How many ids there are is known only where the offsets can be read.
    if readable(cu_seqlens):
        check_range("positions", positions, 0, int(cu_seqlens[-1]))
    return reference.prefixed_positions(positions.to(torch.int64), cu_seqlens, num_prompts)


def prefixed_rows(rows: Tensor, cu_seqlens: Tensor, num_prompts: int) -> Tensor:
    """Call `prefixed_positions`, whose former name this is, and say so."""
    announce("cdpvae_kernels", "prefixed_rows", "prefixed_positions", stacklevel=2)
    return prefixed_positions(rows, cu_seqlens, num_prompts)


@torch.library.custom_op("cdpvae_kernels::prefixed_embedding", mutates_args=())
def _operator(
    embedding: Tensor,
    ids: Tensor,
    cu_seqlens: Tensor,
    prompts: Tensor,
) -> Tensor:
    return _pack(embedding, ids, cu_seqlens, prompts)


@_operator.register_fake
def _(
    embedding: Tensor,
    ids: Tensor,
    cu_seqlens: Tensor,
    prompts: Tensor,
) -> Tensor:
    batch, num_prompts, width = prompts.shape
    return prompts.new_empty(ids.shape[0] + batch * num_prompts, width)


@torch.library.custom_op("cdpvae_kernels::prefixed_embedding_backward", mutates_args=())
def _gradients(
    grad: Tensor,
    ids: Tensor,
    cu_seqlens: Tensor,
    num_prompts: int,
    vocab: int,
    want_embedding: bool,
    want_prompts: bool,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of the embedding (V, D) and of the prompts (B, P, D).

    One that is not wanted is empty: an operator cannot return None.
    An operator without a derivative: a second differentiation is an error, never a wrong number.
    """
    of_embedding, of_prompts = grad.new_empty(0), grad.new_empty(0)
    if want_embedding:
        tokens = torch.arange(ids.numel(), device=ids.device)
        positions = reference.prefixed_positions(tokens, cu_seqlens, num_prompts)
        # Sorts the ids and adds in their order on a GPU: the same bits every time.
        of_embedding = torch.ops.aten.embedding_dense_backward(
            grad.index_select(0, positions), ids, vocab, -1, False
        )
    if want_prompts:
        of_prompts = _unprefix(grad, cu_seqlens, num_prompts)
    return of_embedding, of_prompts


@_gradients.register_fake
def _(
    grad: Tensor,
    ids: Tensor,
    cu_seqlens: Tensor,
    num_prompts: int,
    vocab: int,
    want_embedding: bool,
    want_prompts: bool,
) -> tuple[Tensor, Tensor]:
    width = grad.shape[1]
    of_prompts = (cu_seqlens.shape[0] - 1, num_prompts, width)
    return (
        grad.new_empty((vocab, width) if want_embedding else 0),
        grad.new_empty(of_prompts if want_prompts else 0),
    )


class _Context(OperatorContext, Protocol):
    vocab: int
    num_prompts: int


def _save(ctx: _Context, inputs: tuple[Any, ...], output: Tensor) -> None:
    embedding, ids, cu_seqlens, prompts = inputs
    ctx.vocab, ctx.num_prompts = embedding.shape[0], prompts.shape[1]
    ctx.save_for_backward(ids, cu_seqlens)


def _backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
    ids, cu_seqlens = ctx.saved_tensors
    want_embedding, _, _, want_prompts = ctx.needs_input_grad
    of_embedding, of_prompts = _gradients(
        grad, ids, cu_seqlens, ctx.num_prompts, ctx.vocab, want_embedding, want_prompts
    )
    return (
        of_embedding if want_embedding else None,
        None,
        None,
        of_prompts if want_prompts else None,
    )


_operator.register_autograd(_backward, setup_context=_save)


def _through_operator(
    embedding: Tensor,
    ids: Tensor,
    cu_seqlens: Tensor,
    prompts: Tensor,
) -> tuple[Tensor, Tensor]:
    packed = _operator(embedding, ids, cu_seqlens, prompts)
    sequences = torch.arange(cu_seqlens.numel(), device=cu_seqlens.device, dtype=torch.int32)
    return packed, cu_seqlens + prompts.shape[1] * sequences


_IMPLEMENTATIONS = {"reference": reference.prefixed_embedding, "triton": _through_operator}
