"""What an operation is to `benchmarks.kernels`: inputs, variants, the least work, a measured floor.

A variant is a function from the operation's inputs to a tensor, a loss or an output; the gradients
of `inputs.wanted` are taken from it. All variants of an operation compute the same thing, unless
their docstring says where they differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

# The result alone, under `torch.no_grad`: what evaluation pays.
FORWARD = "fwd"
# The result and the gradients of `wanted`: what a training step pays.
BOTH = "fwd+bwd"

# Sizes by name: "hidden", "vocab" and so on, and shares such as "valid".
Shape = Mapping[str, float]


class Inputs(Protocol):
    """A dataclass of tensors."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def wanted(self) -> tuple[Tensor, ...]:
        """The tensors whose gradients a training step needs."""

    @property
    def upstream(self) -> Tensor | None:
        """The output's gradient, None for a scalar loss."""


Given = TypeVar("Given", bound=Inputs)


@dataclass(frozen=True)
class Work:
    """The least an exact implementation does in one call."""

    flops: float
    # Read and written once each, nothing kept in between.
    bytes: float


@dataclass(frozen=True)
class Operation:
    """One operation and all that competes on it.

    name: as `--ops` takes it.
    passes: of `FORWARD` and `BOTH` those that are measured.
    shapes: by device type and size ("small", "full").
    inputs(shape, dtype, device, seed): random data.
    variants: functions of the inputs by their names; "ours" is the first.
    literal: the variant that is the description taken literally.
    work(shape, pass, itemsize): the least work.
    floor(inputs, pass): the measured ceiling, a call of stock PyTorch that does that work and no
        more.
    floor_name: the ceiling's name among the variants.
    short: calls take microseconds, so several go into one measurement and a GPU's own time is
        reported too.
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
        """Bind one pass of the variant `run` to `inputs`: a call without arguments."""
        if of_pass == FORWARD:
            # Some packages compute gradients wherever an input requires one, `no_grad` or not.
            inputs = without_gradients(inputs)
            return lambda: forward(run, inputs)
        return lambda: both(run, inputs)


def without_gradients(inputs: Given) -> Given:
    """Copy the inputs so that no tensor requires a gradient: Liger and CCE go by that alone."""
    tensors = {f.name: getattr(inputs, f.name) for f in fields(inputs)}
    return replace(
        inputs, **{name: t.detach() for name, t in tensors.items() if isinstance(t, Tensor)}
    )


def forward(run: Callable[[Any], Tensor], inputs: Inputs) -> Tensor:
    """Compute the output of a variant alone."""
    with torch.no_grad():
        return run(inputs)


def both(run: Callable[[Any], Tensor], inputs: Inputs) -> Tensor:
    """Compute the output of a variant and the gradients of `wanted`.

    Autograd returns the gradients and they are dropped: nothing accumulates over calls.
    """
    output = run(inputs)
    # One output in another shape, as the padded forms have it, takes the same gradient.
    upstream = None if inputs.upstream is None else inputs.upstream.view_as(output)
    torch.autograd.grad(output, inputs.wanted, upstream)
    return output.detach()


def bytes_of(inputs: Inputs) -> int:
    """Add up the bytes of the tensors that one call may read."""
    tensors = (getattr(inputs, field.name) for field in fields(inputs))
    return sum(t.nbytes for t in tensors if isinstance(t, Tensor))


def even_offsets(batch: int, total: int, device: torch.device) -> Tensor:
    """Make cu_seqlens (B+1,) int32 of `batch` sequences of equal length, `total` tokens in all.

    Equal, so that the padded forms have nothing to pad and lose nothing here: what padding costs
    is the business of `benchmarks.train_step`. Raises ValueError where the lengths are not whole.
    """
    if total % batch:
        raise ValueError(f"{total} tokens in {batch} sequences; their number must divide them")
    return torch.arange(0, total + 1, total // batch, dtype=torch.int32, device=device)


def rows_of(packed: Tensor, cu_seqlens: Tensor, fill: int) -> Tensor:
    """Pad packed ids (T,) to (B, longest), the layout that the description works on."""
    lengths = cu_seqlens.diff().tolist()
    pieces = packed.split(lengths)
    return torch.nn.utils.rnn.pad_sequence(list(pieces), batch_first=True, padding_value=fill)


def copy_of(num_bytes: float, device: torch.device) -> Callable[[], object]:
    """Return a copy, ready to run, that reads and writes `num_bytes` in all."""
    half = max(int(num_bytes) // 2, 1)
    source = torch.ones(half, dtype=torch.uint8, device=device)
    # Written once before it is timed: the first write to new memory is no copy's price.
    target = source.clone()
    return lambda: target.copy_(source)
