"""The generators of a process: seeded, saved and restored together."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed every generator of this process; what `rng_state` saves then depends on nothing else."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def use_deterministic_algorithms(on: bool) -> None:
    """Let this process take only algorithms whose sums have a fixed order, or whatever is fastest.

    To be called before the first matrix product on a GPU. An operation that has no such algorithm
    says so in a warning and runs all the same. FlashAttention's backward asks for this setting.
    """
    torch.use_deterministic_algorithms(on, warn_only=True)
    # Every result is written before it is read: memory need not be filled first.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if on:
        # cuBLAS repeats its bits with a workspace of fixed size only, which it reads from here.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def rng_state() -> dict[str, Any]:
    """Return the state of every generator of this process, as tensors, ints and strings."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    # NumPy types its state for both of its forms; this is the old one.
    assert not isinstance(keys, str)
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put every generator into a state that `rng_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
