"""Scores of texts, and the geometry of latent vectors."""

from cdpvae.metrics.diversity import distinct, seen_shares, self_bleu
from cdpvae.metrics.latent import effective_rank, pairwise_similarities
from cdpvae.metrics.text import ReconstructionMetrics, TextScores

__all__ = [
    "ReconstructionMetrics",
    "TextScores",
    "distinct",
    "effective_rank",
    "pairwise_similarities",
    "seen_shares",
    "self_bleu",
]
