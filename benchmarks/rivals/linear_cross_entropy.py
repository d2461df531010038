"""Reconstruction loss: cross-entropy of a frozen linear head, and who else computes it.

Shapes: `T` positions, `M` valid ones among them, `D` hidden, `V` vocabulary. Every variant returns
the mean over valid positions and is differentiated in `hidden` alone: the head is frozen.

Share of valid positions: at 40 % the other 60 % carry `IGNORE`. Rivals are handed all positions
with such targets, as a user has them; ours is handed the positions and targets of the valid ones,
as the collator prepares them on the host. `eager_valid` is the eager form given the same advantage.
The results call T `rows`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.rivals.operation import BOTH, FORWARD, Operation, Shape, Work
from cdpvae_kernels import linear_cross_entropy

# The target of a position that is not valid.
IGNORE = -100
# The vocabulary of Llama-3.1.
LLAMA_VOCAB = 128256


@dataclass(frozen=True)
class Inputs:
    """hidden (T, D), weight (V, D), targets (T,) with IGNORE; positions and their targets (M,)."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    positions: Tensor
    valid_targets: Tensor
    upstream: None = None

    @property
    def wanted(self) -> tuple[Tensor, ...]:
        """See `operation.Inputs`."""
        return (self.hidden,)


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Draw random data on which the loss is that of a trained model.

    Logits are standard normal, so their log-sum-exp is about ln V + 1/2; the target's own logit is
    raised to between 8 and 16. With targets of probability near 0, as plain random data has them,
    the gradient would be the same at every position and the easy case all that is measured.
    """
    draw = torch.Generator(device).manual_seed(seed)
    count, width, vocab = (int(shape[name]) for name in ("rows", "hidden", "vocab"))
    weight = torch.randn(vocab, width, device=device, generator=draw, dtype=dtype)
    weight.mul_(width**-0.5)

    # Hidden states that point towards their target's own row of the head.
    labels = torch.randint(0, vocab, (count,), device=device, generator=draw)
    hidden = torch.randn(count, width, device=device, generator=draw, dtype=torch.float32)
    raised = torch.rand(count, 1, device=device, generator=draw) * 8.0 + 8.0
    hidden += raised * weight[labels].float()

    # Valid positions at random; all others carry IGNORE.
    order = torch.randperm(count, device=device, generator=draw)
    positions = order[: round(count * shape["valid"])].sort().values
    targets = torch.full_like(labels, IGNORE)
    targets[positions] = labels[positions]
    return Inputs(hidden.to(dtype).requires_grad_(), weight, targets, positions, labels[positions])


def ours(i: Inputs) -> Tensor:
    """Take what the device gets by itself."""
    return _ours(i, None)


def reference(i: Inputs) -> Tensor:
    """Take the plain PyTorch that defines ours, chunk by chunk."""
    return _ours(i, "reference")


def _ours(i: Inputs, impl: str | None) -> Tensor:
    return linear_cross_entropy(
        i.hidden,
        i.weight,
        i.valid_targets,
        positions=i.positions,
        divisor=i.positions.numel(),
        ignore_index=None,
        impl=impl,
    )


def description(i: Inputs) -> Tensor:
    """Take the description literally: whole logits in the model's dtype."""
    return F.cross_entropy(F.linear(i.hidden, i.weight), i.targets, ignore_index=IGNORE)


def eager(i: Inputs) -> Tensor:
    """Do what transformers' causal models do: whole logits, then a copy of them in fp32."""
    logits = F.linear(i.hidden, i.weight)
    if logits.dtype != torch.float64:
        logits = logits.float()
    return F.cross_entropy(logits, i.targets, ignore_index=IGNORE)


def eager_valid(i: Inputs) -> Tensor:
    """Do `eager` at the valid positions alone: what a careful user writes without a kernel."""
    logits = F.linear(i.hidden.index_select(0, i.positions), i.weight)
    if logits.dtype != torch.float64:
        logits = logits.float()
    return F.cross_entropy(logits, i.valid_targets)


def torch_chunked(i: Inputs) -> Tensor:
    """Take torch's own chunked path with its default choices (torch 2.13 and later)."""
    return _torch_chunked(i, None)


def torch_chunked_by_hand(i: Inputs) -> Tensor:
    """Take the same with chunks that suit the device: 2,048 positions on a GPU, 512 on a CPU."""
    return _torch_chunked(i, 2048 if i.hidden.is_cuda else 512)


def _torch_chunked(i: Inputs, positions: int | None) -> Tensor:
    if not hasattr(F, "linear_cross_entropy"):
        raise NotImplementedError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=positions)
    return F.linear_cross_entropy(
        i.hidden, i.weight, i.targets, ignore_index=IGNORE, options=options
    )


def liger(i: Inputs) -> Tensor:
    """Take Liger-Kernel with its default chunk, about T * D / V positions."""
    return _liger(i)


def liger_8(i: Inputs) -> Tensor:
    """Take Liger-Kernel with chunks eight times its default (0.8.5 and later)."""
    return _liger(i, chunk_mem_const=8)


def _liger(i: Inputs, **settings: int) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import (
        LigerFusedLinearCrossEntropyFunction as Fused,
    )

    # Its public wrapper takes keywords but imports transformers; `apply` takes positions only.
    arguments = inspect.signature(Fused.forward).bind(
        None, i.hidden, i.weight, i.targets, ignore_index=IGNORE, **settings
    )
    arguments.apply_defaults()
    return _on_a_gpu(lambda: Fused.apply(*arguments.args[1:])[0])


def cce(i: Inputs) -> Tensor:
    """Take Cut Cross-Entropy with its defaults: it skips gradient blocks below a threshold.

    On random data almost all of them are, so this row is its best case.
    """
    from cut_cross_entropy import linear_cross_entropy as cut

    return _on_a_gpu(lambda: cut(i.hidden, i.weight, i.targets, ignore_index=IGNORE))


def cce_exact(i: Inputs) -> Tensor:
    """Take Cut Cross-Entropy that skips nothing."""
    from cut_cross_entropy import linear_cross_entropy as cut

    return _on_a_gpu(
        lambda: cut(i.hidden, i.weight, i.targets, ignore_index=IGNORE, filter_eps=None)
    )


def _on_a_gpu(call: Callable[[], Tensor]) -> Tensor:
    """Run a rival and say what Triton means by "0 active drivers"."""
    try:
        return call()
    except RuntimeError as error:
        if "active drivers" not in str(error):
            raise
        raise NotImplementedError("its Triton kernels need a GPU") from error


def work(shape: Shape, of_pass: str, itemsize: int) -> Work:
    """Count one product with the head forward and one backward, at the valid positions."""
    valid = round(shape["rows"] * shape["valid"])
    product = 2.0 * valid * shape["hidden"] * shape["vocab"]
    # The head is read once a pass; hidden states are read and their gradient is written.
    head, states = shape["hidden"] * shape["vocab"], valid * shape["hidden"]
    if of_pass == BOTH:
        return Work(2.0 * product, (head + 2.0 * states) * itemsize)
    return Work(product, (head + states) * itemsize)


def floor(i: Inputs, of_pass: str) -> Callable[[], object]:
    """Do the products alone, at the valid positions, into memory that is already there."""
    # Memory that is there before the timing starts: allocating is no part of the floor.
    x = i.hidden.detach().index_select(0, i.positions)
    logits = torch.ones(x.shape[0], i.weight.shape[0], dtype=x.dtype, device=x.device)
    grad = torch.ones_like(x)

    def products() -> None:
        torch.mm(x, i.weight.t(), out=logits)
        if of_pass == BOTH:
            torch.mm(logits, i.weight, out=grad)

    return products


def _shapes(positions: tuple[int, ...], hidden: int, vocab: int) -> tuple[Shape, ...]:
    return tuple(
        {"rows": n, "hidden": hidden, "vocab": vocab, "valid": valid}
        for n in positions
        for valid in (1.0, 0.4)
    )


OPERATION = Operation(
    name="linear_cross_entropy",
    passes=(FORWARD, BOTH),
    shapes={
        ("cpu", "small"): _shapes((256,), 128, 8192),
        ("cpu", "full"): _shapes((2048,), 512, LLAMA_VOCAB),
        ("cuda", "small"): _shapes((1024,), 1024, 32768),
        ("cuda", "full"): _shapes((2048, 8192, 16384), 4096, LLAMA_VOCAB),
    },
    inputs=inputs,
    variants={
        "ours": ours,
        "reference": reference,
        "description": description,
        "eager": eager,
        "eager_valid": eager_valid,
        "torch_chunked": torch_chunked,
        "torch_chunked_by_hand": torch_chunked_by_hand,
        "liger": liger,
        "liger_8": liger_8,
        "cce": cce,
        "cce_exact": cce_exact,
    },
    literal="description",
    work=work,
    floor=floor,
    floor_name="two_gemms",
    short=False,
)
