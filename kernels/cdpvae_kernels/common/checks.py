"""Argument checks that the public functions share.

Shapes and dtypes are checked always. Values are checked where reading them costs nothing: in a CPU
tensor that holds data. On a GPU the check would make the host wait for the device, and a fake
tensor (shape propagation without data) has no values.
"""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# Dtypes that public functions accept for operands, and for ids, targets and positions.
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)


def has_values(tensor: Tensor) -> bool:
    """Return True where the tensor holds data, on any device; in a traced graph no tensor does."""
    if torch.compiler.is_compiling():
        return False
    return not isinstance(tensor, FakeTensor) and tensor.device.type != "meta"


def readable(tensor: Tensor) -> bool:
    """Return True where the values can be read without waiting for a device."""
    return has_values(tensor) and tensor.device.type == "cpu"


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int | str, ...],
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """Raise ValueError unless `tensor` has one of `dtypes` and the given shape.

    name: of the argument, for the message.
    tensor: the argument.
    shape: an integer must match; a string names a free dimension in the message.
    dtypes: those that are accepted.
    """
    matches = tensor.dim() == len(shape) and all(
        isinstance(rule, str) or size == rule
        for size, rule in zip(tensor.shape, shape, strict=True)
    )
    if not matches:
        rule = "(" + ", ".join(str(size) for size in shape) + ")"
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {rule}")
    if tensor.dtype not in dtypes:
        allowed = ", ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name} has dtype {tensor.dtype}; convert it to one of: {allowed}")


def check_range(name: str, tensor: Tensor, low: int, high: int) -> None:
    """Raise ValueError unless every value lies in [low, high); silent where not readable."""
    if tensor.numel() == 0 or not readable(tensor):
        return
    # Both bounds in one pass; the message names a value that is wrong.
    smallest, largest = (int(bound) for bound in tensor.aminmax())
    if smallest < low or largest >= high:
        wrong = smallest if smallest < low else largest
        raise ValueError(f"{name} holds {wrong}; every value must lie in [{low}, {high})")


def check_packing(ids: Tensor, cu_seqlens: Tensor) -> None:
    """Raise ValueError unless ids (T,) and cu_seqlens (B+1,) int32 describe packed sequences."""
    # Shapes and dtypes first: the values mean nothing without them.
    check_tensor("ids", ids, ("T",), INTEGERS)
    check_tensor("cu_seqlens", cu_seqlens, ("B+1",), (torch.int32,))
    if cu_seqlens.numel() == 0:
        raise ValueError("cu_seqlens is empty; it must hold B+1 offsets, the first of them 0")
    if not readable(cu_seqlens):
        return
    # Offsets that do not cover the ids would read the wrong tokens in silence.
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != ids.numel():
        raise ValueError(
            f"cu_seqlens runs from {first} to {last}; it must run from 0 to "
            f"the number of ids, {ids.numel()}"
        )
    if bool((cu_seqlens[1:] < cu_seqlens[:-1]).any()):
        raise ValueError(f"cu_seqlens decreases: {cu_seqlens.tolist()}; offsets must not decrease")
