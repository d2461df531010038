"""Word dropout on packed ids: the decoder reads some of its own input replaced by a fill id."""

from cdpvae_kernels.word_dropout.op import word_dropout

__all__ = ["word_dropout"]
