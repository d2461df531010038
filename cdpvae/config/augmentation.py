"""The second view of an instruction."""

from __future__ import annotations

from pydantic import Field

from cdpvae.config.base import Group


class AugmentationConfig(Group):
    """The second view of an instruction, for InfoNCE."""

    augmentation_probability: float = Field(
        0.5, ge=0, le=1, description="share of optimizer steps that compute the view"
    )
    span_mask_prob: float = Field(0.15, ge=0, le=1, description="expected share of tokens masked")
    span_max_len: int = Field(5, ge=1, description="span length is uniform in 1..span_max_len")
    word_dropout_rate: float = Field(0.1, ge=0, le=1, description="share of tokens replaced")
    shuffle_window: int = Field(
        0, ge=0, description="permute tokens within windows of this size; 0 or 1 is off"
    )
