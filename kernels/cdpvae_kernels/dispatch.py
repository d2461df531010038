"""Which implementation of an operation runs.

Each public function keeps a table {name: callable}; adding a Triton kernel is adding one entry.
"""

from collections.abc import Callable, Mapping

import torch


def choose(
    op: str, impl: str | None, device: torch.device, implementations: Mapping[str, Callable]
) -> Callable:
    """The implementation of `op` to run: the one named, or the best one for `device` if None.

    Raises ValueError for a name that `op` does not have.
    """
    if impl is None:
        impl = "triton" if device.type == "cuda" and "triton" in implementations else "reference"
    if impl not in implementations:
        raise ValueError(
            f"impl={impl!r}: {op} has the implementations {sorted(implementations)}; "
            "name one of them, or pass None to pick by device"
        )
    return implementations[impl]
