"""The second view of an instruction, which InfoNCE compares with the first."""

from __future__ import annotations

from pydantic import Field

from cdpvae.config.base import Group


class AugmentationConfig(Group):
    """The second view of an instruction, for InfoNCE."""

    # How often a step has a second view at all; every view costs one more encoder pass.
    augmentation_probability: float = Field(
        default=0.5, ge=0, le=1, description="share of optimizer steps that compute the view"
    )
    # What the view changes in the text.
    span_mask_prob: float = Field(
        default=0.15, ge=0, le=1, description="expected share of tokens in masked spans"
    )
    span_max_len: int = Field(
        default=5, ge=1, description="span length in tokens is uniform in 1..span_max_len"
    )
    word_dropout_rate: float = Field(
        default=0.1, ge=0, le=1, description="share of tokens replaced one by one"
    )
    shuffle_window: int = Field(
        default=0, ge=0, description="permute tokens within windows of this size; 0 or 1 is off"
    )
