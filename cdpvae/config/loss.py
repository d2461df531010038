"""The objective: weights and variants of its terms."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from cdpvae.config.base import Group


class LossConfig(Group):
    """Weights and variants of the four terms (`semantics.md`, Losses)."""

    group: ClassVar[str | None] = "loss"

    objective: Literal["per_token", "elbo"] = Field(
        "per_token", description="mean token CE + beta KL/Z, or the ELBO's sums per sequence"
    )
    beta_max: float = Field(1.0, ge=0)
    beta_cycles: int = Field(4, ge=1, description="cycles of the KL annealing")
    beta_ramp_ratio: float = Field(0.5, ge=0, le=1, description="rising share of each cycle")
    free_bits: float = Field(0.5, ge=0, description="nats per dimension")
    bow_weight: float = Field(1.5, ge=0)
    bow_reduction: Literal["bce", "categorical"] = Field(
        "bce", description="multi-label BCE (description) or -log softmax (literature)"
    )
    contrastive_weight: float = Field(0.1, ge=0, description="InfoNCE")
    temperature: float = Field(0.07, gt=0)
    normalize_latents: bool = Field(True, description="L2-normalise mu before the similarity")
    queue_size: int = Field(0, ge=0, description="past positives kept as further negatives")
    word_dropout: float = Field(0.4, ge=0, le=1, description="share of decoder inputs dropped")
