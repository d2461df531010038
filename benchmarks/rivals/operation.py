"""What an operation is to `benchmarks.kernels`: inputs, variants, the least work, a measured floor.

A variant is a function from the operation's inputs to a tensor, a loss or an output; the gradients
of `inputs.wanted` are taken from it. All variants of an operation compute the same thing, unless
their docstring says where they differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

FORWARD = "fwd"
"""The result alone, under `torch.no_grad`: what evaluation pays."""
BOTH = "fwd+bwd"
"""The result and the gradients of `wanted`: what a training step pays."""

Shape = Mapping[str, float]


class Inputs(Protocol):
    """A dataclass of tensors. `upstream` is the output's gradient, None for a scalar loss."""

    @property
    def wanted(self) -> tuple[Tensor, ...]: ...

    @property
    def upstream(self) -> Tensor | None: ...


@dataclass(frozen=True)
class Work:
    """The least an exact implementation does in one call."""

    flops: float
    bytes: float
    """read and written once each, nothing kept in between"""


@dataclass(frozen=True)
class Operation:
    """One operation and all that competes on it.

    inputs(shape, dtype, device, seed): random data. work(shape, pass, itemsize): the least work.
    floor(inputs, pass): the measured ceiling, a call of stock PyTorch that does that work and no
    more. literal: the variant that is the description taken literally. short: calls take
    microseconds, so several go into one measurement and a GPU's own time is reported too.
    """

    name: str
    passes: tuple[str, ...]
    shapes: Mapping[tuple[str, str], tuple[Shape, ...]]
    inputs: Callable[[Shape, torch.dtype, torch.device, int], Inputs]
    variants: Mapping[str, Callable[[Any], Tensor]]
    literal: str
    work: Callable[[Shape, str, int], Work]
    floor: Callable[[Any, str], Callable[[], object]]
    floor_name: str
    short: bool

    def call(self, of_pass: str, run: Callable[[Any], Tensor], inputs: Any) -> Callable[[], Tensor]:
        """One pass of the variant `run` on `inputs`, as a call without arguments."""
        if of_pass == FORWARD:
            inputs = without_gradients(inputs)
            return lambda: forward(run, inputs)
        return lambda: both(run, inputs)


def without_gradients(inputs: Any) -> Any:
    """The same inputs, none of which requires a gradient: Liger and CCE go by that alone."""
    tensors = {f.name: getattr(inputs, f.name) for f in fields(inputs)}
    return replace(
        inputs, **{name: t.detach() for name, t in tensors.items() if isinstance(t, Tensor)}
    )


def forward(run: Callable[[Any], Tensor], inputs: Any) -> Tensor:
    with torch.no_grad():
        return run(inputs)


def both(run: Callable[[Any], Tensor], inputs: Any) -> Tensor:
    """Gradients are returned by autograd and dropped: nothing accumulates over calls."""
    output = run(inputs)
    upstream = None if inputs.upstream is None else inputs.upstream.view_as(output)
    torch.autograd.grad(output, inputs.wanted, upstream)
    return output.detach()


def bytes_of(inputs: Inputs) -> int:
    """The size of the tensors that one call may read."""
    tensors = (getattr(inputs, field.name) for field in fields(inputs))
    return sum(t.nbytes for t in tensors if isinstance(t, Tensor))


def even_offsets(batch: int, total: int, device: torch.device) -> Tensor:
    """cu_seqlens (B+1,) int32 of `batch` sequences of equal length, `total` tokens in all.

    Equal, so that the padded forms have nothing to pad and lose nothing here: what padding costs
    is the business of `benchmarks.train_step`. Raises ValueError where the lengths are not whole.
    """
    if total % batch:
        raise ValueError(f"{total} tokens in {batch} sequences; their number must divide them")
    return torch.arange(0, total + 1, total // batch, dtype=torch.int32, device=device)


def rows_of(packed: Tensor, cu_seqlens: Tensor, fill: int) -> Tensor:
    """Packed ids (T,) -> padded (B, longest), the layout that the description works on."""
    lengths = cu_seqlens.diff().tolist()
    pieces = packed.split(lengths)
    return torch.nn.utils.rnn.pad_sequence(list(pieces), batch_first=True, padding_value=fill)


def copy_of(num_bytes: float, device: torch.device) -> Callable[[], object]:
    """A copy that reads and writes `num_bytes` in all."""
    half = max(int(num_bytes) // 2, 1)
    source = torch.ones(half, dtype=torch.uint8, device=device)
    target = source.clone()  # written once: the first write to new memory is no copy's price
    return lambda: target.copy_(source)
