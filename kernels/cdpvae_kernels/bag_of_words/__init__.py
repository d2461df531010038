"""Bag-of-words losses: what z alone says about which tokens the text holds."""

from cdpvae_kernels.bag_of_words.bce import bow_bce
from cdpvae_kernels.bag_of_words.categorical import bow_categorical

__all__ = ["bow_bce", "bow_categorical"]
