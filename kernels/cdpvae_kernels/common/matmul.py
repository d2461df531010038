"""Matrix products that accumulate and return at least fp32, on every device.

On a GPU bf16 and fp16 operands go through the tensor cores and the result stays fp32
(`out_dtype`). A CPU has no such product and rounds its bf16 results: there the operands are
converted first.
"""

import torch
from torch import Tensor

# The dtypes whose products would be rounded to 8 or 11 bits.
HALVES = (torch.bfloat16, torch.float16)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def operand(matrix: Tensor) -> Tensor:
    """Convert a matrix to what `matmul` reads, so that one used many times is converted once."""
    return matrix.float() if matrix.dtype in HALVES and matrix.device.type == "cpu" else matrix


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Multiply a (M, K) @ b (K, N), as `operand` gives them; returns (M, N) fp32 or fp64.

    out: where the product goes, if given.
    """
    if a.dtype not in HALVES:
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    if out is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total`, in place."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(matmul(a, b))
