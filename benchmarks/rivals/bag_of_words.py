"""Bag-of-words losses: what z alone says about the tokens of a text, and who else computes it.

Shapes: `B` rows, `Z` latent, `V` vocabulary, `T` packed tokens, `S` longest row. Two operations on
the same inputs: the multi-label BCE over each row's *set* of tokens, and the categorical loss over
its tokens. Differentiated in z, weight and bias. No package offers either in one piece, so the
rivals are stock PyTorch.
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
from cdpvae_kernels import bow_bce, bow_categorical

# What padded targets hold where a row has ended.
IGNORE = -100
# The vocabulary of Llama-3.1, and the length of every row.
LLAMA_VOCAB = 128256
TOKENS_PER_ROW = 256


@dataclass(frozen=True)
class Inputs:
    """z (B, Z), weight (V, Z), bias (V,), ids (T,), cu_seqlens (B+1,), target_ids (B, S)."""

    z: Tensor
    weight: Tensor
    bias: Tensor
    ids: Tensor
    cu_seqlens: Tensor
    # The same ids padded with IGNORE: what the padded forms read.
    target_ids: Tensor
    upstream: None = None

    @property
    def wanted(self) -> tuple[Tensor, ...]:
        """See `operation.Inputs`."""
        return (self.z, self.weight, self.bias)


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Draw random data; ids are skewed to low ones, so that rows repeat tokens."""
    # A head whose logits spread by about 1 around -4: most tokens are absent from most rows.
    draw = torch.Generator(device).manual_seed(seed)
    batch, latent, vocab = (int(shape[name]) for name in ("batch", "latent", "vocab"))
    z = torch.randn(batch, latent, device=device, generator=draw, dtype=dtype)
    weight = torch.randn(vocab, latent, device=device, generator=draw, dtype=dtype)
    bias = torch.randn(vocab, device=device, generator=draw, dtype=dtype)

    # The cube of a uniform number: low ids are frequent, as frequent words are.
    tokens = batch * TOKENS_PER_ROW
    ids = (torch.rand(tokens, device=device, generator=draw).pow(3) * (vocab - 1)).long()
    offsets = even_offsets(batch, tokens, device)
    return Inputs(
        z.requires_grad_(),
        weight.mul_(latent**-0.5).requires_grad_(),
        bias.sub_(4.0).requires_grad_(),
        ids,
        offsets,
        rows_of(ids, offsets, IGNORE),
    )


def _logits(i: Inputs) -> Tensor:
    logits = F.linear(i.z, i.weight, i.bias)
    return logits if logits.dtype == torch.float64 else logits.float()


def _row_of_token(i: Inputs) -> Tensor:
    rows = torch.arange(i.z.shape[0], device=i.ids.device)
    return rows.repeat_interleave(i.cu_seqlens.diff(), output_size=i.ids.numel())


def ours(i: Inputs) -> Tensor:
    """Take what the device gets by itself."""
    return bow_bce(i.z, i.weight, i.bias, i.ids, i.cu_seqlens)


def reference(i: Inputs) -> Tensor:
    """Take the plain PyTorch that defines ours: whole logits and a multi-hot."""
    return bow_bce(i.z, i.weight, i.bias, i.ids, i.cu_seqlens, impl="reference")


def description(i: Inputs) -> Tensor:
    """Take the description literally: a dense multi-hot filled row by row in a Python loop."""
    logits = _logits(i)
    target = torch.zeros(*logits.shape, dtype=logits.dtype, device=logits.device)
    for b in range(logits.shape[0]):
        valid_ids = i.target_ids[b][i.target_ids[b] != IGNORE]
        target[b].scatter_(0, valid_ids, 1.0)
    return F.binary_cross_entropy_with_logits(logits, target)


def eager(i: Inputs) -> Tensor:
    """Do the same without the loop: one indexed write into the dense multi-hot."""
    logits = _logits(i)
    target = torch.zeros_like(logits)
    target[_row_of_token(i), i.ids] = 1.0
    return F.binary_cross_entropy_with_logits(logits, target)


def eager_no_multi_hot(i: Inputs) -> Tensor:
    """Do what a careful user writes: softplus over all logits, less those of the set's tokens.

    The set is made by sorting (row, token), which on a GPU makes the host wait.
    """
    logits = _logits(i)
    # A set of (row, token): a repeated token counts once.
    cells = torch.unique(_row_of_token(i) * logits.shape[1] + i.ids)
    positives = logits.view(-1).index_select(0, cells)
    return (F.softplus(logits).sum() - positives.sum()) / logits.numel()


def categorical_ours(i: Inputs) -> Tensor:
    """Take what the device gets by itself."""
    return bow_categorical(i.z, i.weight, i.bias, i.ids, i.cu_seqlens)


def categorical_reference(i: Inputs) -> Tensor:
    """Take the plain PyTorch that defines ours: what runs on a CPU."""
    return bow_categorical(i.z, i.weight, i.bias, i.ids, i.cu_seqlens, impl="reference")


def categorical_eager(i: Inputs) -> Tensor:
    """Gather whole log-probabilities at the padded targets and average row by row."""
    log_p = _logits(i).log_softmax(dim=-1)
    valid = i.target_ids != IGNORE
    # Padding gathers token 0 and is masked out.
    picked = log_p.gather(1, i.target_ids.clamp(min=0)) * valid
    return -(picked.sum(dim=1) / valid.sum(dim=1).clamp(min=1)).mean()


def categorical_eager_no_log_p(i: Inputs) -> Tensor:
    """Do what a careful user writes: the mean target logit less one log-sum-exp a row."""
    logits = _logits(i)
    valid = i.target_ids != IGNORE
    picked = (logits.gather(1, i.target_ids.clamp(min=0)) * valid).sum(dim=1)
    lengths = valid.sum(dim=1)
    # A row without tokens has no loss.
    lse = logits.logsumexp(dim=1) * (lengths > 0)
    return (lse - picked / lengths.clamp(min=1)).mean()


def work(shape: Shape, of_pass: str, itemsize: int) -> Work:
    """Count one product forward and two backward, the head read and its gradient written once."""
    # Of a product z W^T: two operations for each of B x Z x V.
    product = 2.0 * shape["batch"] * shape["latent"] * shape["vocab"]
    head = (shape["latent"] + 1.0) * shape["vocab"] * itemsize
    return Work(3.0 * product, 2.0 * head) if of_pass == BOTH else Work(product, head)


def floor(i: Inputs, of_pass: str) -> Callable[[], object]:
    """Copy as many bytes as the least work moves."""
    shape = {"batch": i.z.shape[0], "latent": i.z.shape[1], "vocab": i.weight.shape[0]}
    return copy_of(work(shape, of_pass, i.weight.itemsize).bytes, i.z.device)


def _shapes(batches: tuple[int, ...], vocab: int) -> tuple[Shape, ...]:
    return tuple({"batch": b, "latent": 64, "vocab": vocab} for b in batches)


_SHAPES = {
    # Small: seconds for all variants, to try something out. Full: what the results are about.
    ("cpu", "small"): _shapes((8,), 8192),
    ("cpu", "full"): _shapes((8, 64), LLAMA_VOCAB),
    ("cuda", "small"): _shapes((8,), 32768),
    ("cuda", "full"): _shapes((8, 64, 256), LLAMA_VOCAB),
}

BCE = Operation(
    name="bow_bce",
    passes=(FORWARD, BOTH),
    shapes=_SHAPES,
    inputs=inputs,
    variants={
        "ours": ours,
        "reference": reference,
        "description": description,
        "eager": eager,
        "eager_no_multi_hot": eager_no_multi_hot,
    },
    literal="description",
    work=work,
    floor=floor,
    floor_name="copy",
    short=True,
)

CATEGORICAL = Operation(
    name="bow_categorical",
    passes=(FORWARD, BOTH),
    shapes=_SHAPES,
    inputs=inputs,
    variants={
        "ours": categorical_ours,
        "reference": categorical_reference,
        "eager": categorical_eager,
        "eager_no_log_p": categorical_eager_no_log_p,
    },
    literal="eager",
    work=work,
    floor=floor,
    floor_name="copy",
    short=True,
)
