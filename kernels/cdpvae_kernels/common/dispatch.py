"""Which implementation of an operation runs.

Each public function keeps a table {name: callable}: "reference", which defines the operation, and
where there is one "triton", the kernel for GPUs, and "tiled", the fast path of CPUs. Triton is
imported when such an entry is first used, so that the package works where it is not installed.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch

# fp64 is the oracle's dtype: only the reference computes in it.
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def choose_name(
    op: str,
    impl: str | None,
    device: torch.device,
    implementations: Collection[str],
    dtype: torch.dtype | None = None,
) -> str:
    """Return the name of the implementation to run: the one asked for, or the best for `device`.

    op: the operation, for messages.
    impl: the name asked for; None for the best one.
    device: where the operands are.
    implementations: the names that `op` has.
    dtype: that of the computation, where the operation has floating-point operands.

    Raises ValueError for a name that `op` does not have, and for one that cannot run here.
    """
    # Without a wish: what is fastest on the device, or the reference where that is missing.
    fits = dtype is None or dtype in TRITON_DTYPES
    if impl is None:
        best = "reference"
        if device.type == "cpu":
            best = "tiled"
        elif device.type == "cuda" and fits and triton_is_installed():
            best = "triton"
        return best if best in implementations else "reference"

    # A wish is granted or refused with the reason, never silently replaced.
    if impl not in implementations:
        raise ValueError(
            f"impl={impl!r}: {op} has the implementations {sorted(implementations)}; "
            "name one of them, or pass None to pick by device"
        )
    if impl == "triton":
        _check_triton(op, device, dtype, fits)
    # Shapes alone (meta) are propagated by any of them.
    if impl == "tiled" and device.type not in ("cpu", "meta"):
        raise ValueError(
            f"impl='tiled': {op} got tensors on {device}; tiles are cut for a CPU's cache, pass "
            "None to pick by device"
        )
    return impl


def choose(
    op: str,
    impl: str | None,
    device: torch.device,
    implementations: Mapping[str, Callable[..., Any]],
    dtype: torch.dtype | None = None,
) -> Callable[..., Any]:
    """Return the implementation itself; arguments and errors as for `choose_name`.

    implementations: the callables of `op` by their names.
    dtype: that of the computation, where the operation has floating-point operands.
    """
    return implementations[choose_name(op, impl, device, implementations, dtype)]


def describe(impl: str | None, device: torch.device) -> str:
    """Say what will run on `device`, for the log: 'triton (launch_configs.json: sm_90)'.

    Raises ValueError for an `impl` that cannot run there, as the operations would.
    """
    name = choose_name("every operation", impl, device, ("reference", "tiled", "triton"))
    if name != "triton":
        return f"{name} (plain PyTorch)"
    # Which table counts decides the last bits of results, so a log should say it.
    from cdpvae_kernels.common.launch_configs import describe as describe_table

    return f"triton ({describe_table(device)})"


def from_triton(operation: str, function: str) -> Callable[..., Any]:
    """Return a stand-in for `<operation>.triton_launch.<function>`.

    The file, and Triton with it, is imported when the stand-in is first called. The device of the
    tensors is the current one meanwhile: Triton launches on the current one, wherever they are.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        loaded = importlib.import_module(f"cdpvae_kernels.{operation}.triton_launch")
        gpus = (a.device for a in args if isinstance(a, torch.Tensor) and a.device.type == "cuda")
        device = next(gpus, None)
        with nullcontext() if device is None else torch.cuda.device(device):
            return getattr(loaded, function)(*args, **kwargs)

    return call


@cache
def triton_is_installed() -> bool:
    """Return True where Triton can be imported, without importing it."""
    return importlib.util.find_spec("triton") is not None


def _check_triton(
    op: str,
    device: torch.device,
    dtype: torch.dtype | None,
    fits: bool,
) -> None:
    """Raise ValueError where kernels cannot run.

    op: the operation, for messages.
    device: where the operands are.
    dtype: that of the computation.
    fits: whether kernels compute in `dtype`.
    """
    # What no kernel can do, on any device.
    if not triton_is_installed():
        raise ValueError(f"impl='triton': {op} needs the package triton, which is not installed")
    if not fits:
        allowed = ", ".join(str(d) for d in TRITON_DTYPES)
        raise ValueError(f"impl='triton': {op} computes in {dtype}; kernels take {allowed}")

    # What the interpreter, which stands in for a GPU, cannot do.
    from cdpvae_kernels.common import runtime

    if device.type == "cuda":
        return
    if not runtime.interpreting():
        raise ValueError(
            f"impl='triton': {op} got tensors on {device}; kernels run on a GPU, or on a CPU under "
            "TRITON_INTERPRET=1"
        )
    if dtype == torch.bfloat16:
        raise ValueError(
            f"impl='triton': {op} in bfloat16 under TRITON_INTERPRET=1: the interpreter's bfloat16 "
            "arithmetic silently returns garbage; use float32 or float16 there"
        )
