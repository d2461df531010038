"""The operations in Triton, one file each: kernels, what launches them, how to compile them ahead.

Importing a file here imports Triton; `cdpvae_kernels.dispatch` does so when a kernel is first used.
Every file ends with `specializations()`, the ways its kernels are compiled for the 8B shapes, which
`python -m cdpvae_kernels.resources` needs to count registers without a GPU, and `tunables()`, its
kernels on data of their own, which `python -m cdpvae_kernels.tune` measures.
"""

import importlib
import pkgutil
from types import ModuleType


def modules() -> list[ModuleType]:
    """Every file here that holds kernels."""
    found = [
        importlib.import_module(f"{__name__}.{entry.name}")
        for entry in pkgutil.iter_modules(__path__)
    ]
    return [module for module in found if hasattr(module, "specializations")]
