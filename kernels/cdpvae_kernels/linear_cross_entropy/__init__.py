"""Cross-entropy of a linear head without ever holding the logits whole."""

from cdpvae_kernels.linear_cross_entropy.op import Stats, linear_cross_entropy

__all__ = ["Stats", "linear_cross_entropy"]
