"""Scores of texts, and the geometry of latent vectors."""

from cdpvae.metrics.latent import effective_rank, pairwise_similarities
from cdpvae.metrics.text import ReconstructionMetrics, TextScores

__all__ = ["ReconstructionMetrics", "TextScores", "effective_rank", "pairwise_similarities"]
