"""The decoder's packed input: each sequence's soft prompts, then its token embeddings."""

from cdpvae_kernels.prefixed_embedding.op import (
    prefixed_embedding,
    prefixed_positions,
    prefixed_rows,
)

__all__ = ["prefixed_embedding", "prefixed_positions", "prefixed_rows"]
