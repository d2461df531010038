"""The former place of `check_range` and `has_values`: import them from `cdpvae_kernels`."""

from cdpvae_kernels.common.checks import check_range, has_values

__all__ = ["check_range", "has_values"]
