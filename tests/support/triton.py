"""What the tests of Triton kernels share: the device, the dtypes it can do, poisoned memory."""

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter's bf16 arithmetic is garbage: only a GPU can test it.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh floating-point memory holds NaN: what a kernel leaves unwritten is seen."""

    def poison(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


@pytest.fixture
def minima_of_a_gpu(monkeypatch):
    """The interpreter's min and max of NaN and a number are the number, as PTX has them."""
    if DEVICE.type == "cuda":
        return
    builder = interpreter.InterpreterBuilder
    for name, function in (("minnumf", np.fmin), ("maxnumf", np.fmax)):
        monkeypatch.setattr(
            builder,
            f"create_{name}",
            lambda self, a, b, function=function: self.binary_op(a, b, function),
        )
