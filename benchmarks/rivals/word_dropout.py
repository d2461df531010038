"""Word dropout: some of the decoder's own input replaced, and who else does it.

Shapes: `B` sequences, `T` packed tokens, `S` longest sequence. The rivals draw from torch's
generator: the same law, other bits, and unlike ours other bits again under recomputation or on
another number of ranks. Nothing here has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.rivals.operation import (
    FORWARD,
    Operation,
    Shape,
    Work,
    copy_of,
    even_offsets,
    rows_of,
)
from cdpvae_kernels import word_dropout

# The rate of training; an id that no row holds, so that a drop is seen.
RATE, FILL_ID, LLAMA_VOCAB = 0.4, 0, 128256


@dataclass(frozen=True)
class Inputs:
    """ids (T,), cu_seqlens (B+1,), sample_index (B,), padded_ids (B, S)."""

    ids: Tensor
    cu_seqlens: Tensor
    sample_index: Tensor
    padded_ids: Tensor
    upstream: None = None

    @property
    def wanted(self) -> tuple[Tensor, ...]:
        """See `operation.Inputs`."""
        return ()


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Draw random ids other than FILL_ID; `dtype` has no part in it."""
    draw = torch.Generator(device).manual_seed(seed)
    batch, tokens = int(shape["batch"]), int(shape["tokens"])
    ids = torch.randint(FILL_ID + 1, LLAMA_VOCAB, (tokens,), device=device, generator=draw)
    offsets = even_offsets(batch, tokens, device)
    # Other samples in each copy, so that no copy repeats another's draws.
    samples = torch.arange(batch, device=device) + 1000 * seed
    return Inputs(ids, offsets, samples, rows_of(ids, offsets, FILL_ID))


def ours(i: Inputs) -> Tensor:
    """Take what the device gets by itself."""
    return _ours(i, None)


def reference(i: Inputs) -> Tensor:
    """Take the plain PyTorch that defines ours: what runs on a CPU."""
    return _ours(i, "reference")


def _ours(i: Inputs, impl: str | None) -> Tensor:
    return word_dropout(
        i.ids,
        i.cu_seqlens,
        i.sample_index,
        rate=RATE,
        fill_id=FILL_ID,
        seed=7,
        epoch=0,
        impl=impl,
    )


def description(i: Inputs) -> Tensor:
    """Take the description literally, on padded ids: a Bernoulli mask, the first column kept."""
    kept = torch.bernoulli(torch.full_like(i.padded_ids, 1.0 - RATE, dtype=torch.float32)).bool()
    kept[:, 0] = True
    return torch.where(kept, i.padded_ids, FILL_ID)


def eager(i: Inputs) -> Tensor:
    """Draw a uniform mask on packed ids and take the first token of each sequence out."""
    # The first token of a sequence is never dropped, by ours neither.
    dropped = torch.rand(i.ids.shape, device=i.ids.device) < RATE
    dropped[i.cu_seqlens[:-1].long()] = False
    return i.ids.masked_fill(dropped, FILL_ID)


def work(shape: Shape, of_pass: str, itemsize: int) -> Work:
    """Count ids (8 bytes each) read and written; the random numbers are not counted."""
    return Work(0.0, 2.0 * shape["tokens"] * 8)


def floor(i: Inputs, of_pass: str) -> Callable[[], object]:
    """Copy as many bytes as the ids have, in and out."""
    return copy_of(2 * i.ids.nbytes, i.ids.device)


OPERATION = Operation(
    name="word_dropout",
    passes=(FORWARD,),
    shapes={
        ("cpu", "small"): ({"tokens": 1024, "batch": 8},),
        ("cpu", "full"): ({"tokens": 8192, "batch": 8},),
        ("cuda", "small"): ({"tokens": 1024, "batch": 8},),
        ("cuda", "full"): ({"tokens": 8192, "batch": 8},),
    },
    inputs=inputs,
    variants={"ours": ours, "reference": reference, "description": description, "eager": eager},
    literal="description",
    work=work,
    floor=floor,
    floor_name="copy",
    short=True,
)
