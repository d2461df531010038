"""The objective: weights and variants of its terms."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from cdpvae.config.base import Group

Objective = Literal["per_token", "elbo"]
BowReduction = Literal["bce", "categorical"]
FreeBitsVariant = Literal["dimension_batch", "sample", "aggregate"]
RateControl = Literal["lagrange", "pi"]


class LossConfig(Group):
    """Weights and variants of the four terms: reconstruction, KL, bag of words, InfoNCE."""

    group: ClassVar[str | None] = "loss"

    objective: Objective = Field(
        default="per_token",
        description="mean token CE + beta KL/Z, or the ELBO's sums per sequence",
    )
    # The KL term: its weight beta is annealed in cycles (Fu et al. 2019).
    beta_max: float = Field(
        default=1.0,
        ge=0,
        description="weight of the KL at the top of each cycle, or the most that rate_target sets",
    )
    beta_cycles: int = Field(default=4, ge=1, description="cycles of the KL annealing")
    beta_ramp_ratio: float = Field(
        default=0.5, ge=0, le=1, description="rising share of each cycle"
    )
    free_bits: float = Field(
        default=0.5, ge=0, description="KL that costs nothing, nats per dimension"
    )
    free_bits_variant: FreeBitsVariant = Field(
        default="dimension_batch",
        description="floor on each dimension's batch mean, on each row's KL in it, or on the sum",
    )
    # Instead of the annealing: the weight of the KL is moved until the rate is this.
    rate_target: float | None = Field(
        default=None, gt=0, description="KL that is aimed at, nats per sequence; null anneals beta"
    )
    rate_control: RateControl = Field(
        default="lagrange",
        description="how rate_target moves beta: a Lagrange multiplier or PI control (ControlVAE)",
    )
    # The bag of words: z alone must predict which tokens occur in the response.
    bow_weight: float = Field(default=1.5, ge=0, description="weight of the bag of words; 0 is off")
    bow_reduction: BowReduction = Field(
        default="bce",
        description="multi-label BCE (the original description) or -log softmax (literature)",
    )
    # Order: z and a position alone must predict the token there.
    order_weight: float = Field(
        default=0.0,
        ge=0,
        description="weight of the prediction of each token from z and its place, no word read; "
        "needs model.positional_slots; 0 is off",
    )
    order_fall_ratio: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of the run over which order_weight falls linearly to 0, its work done; "
        "null keeps it",
    )
    # InfoNCE: mu must tell its own augmented view from those of other rows.
    contrastive_weight: float = Field(default=0.1, ge=0, description="weight of InfoNCE; 0 is off")
    temperature: float = Field(
        default=0.07, gt=0, description="divides the similarities of InfoNCE"
    )
    normalize_latents: bool = Field(
        default=True, description="L2-normalise mu before the similarity"
    )
    queue_size: int = Field(default=0, ge=0, description="past positives kept as further negatives")
    # The decoder's input: what is dropped there can be known from z only.
    word_dropout: float = Field(
        default=0.4, ge=0, le=1, description="share of decoder inputs dropped"
    )
    word_dropout_start: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="share dropped in the first step, from where it falls linearly to "
        "word_dropout; null is word_dropout throughout",
    )
    word_dropout_fall_ratio: float = Field(
        default=0.5, gt=0, le=1, description="share of the run over which it falls"
    )

    @model_validator(mode="after")
    def _falls(self) -> LossConfig:
        """Refuse a way without a start, and one that rises."""
        if self.order_fall_ratio is not None and not self.order_weight:
            raise ValueError(
                f"order_fall_ratio={self.order_fall_ratio} has no effect with order_weight=0; drop "
                "one or set both"
            )
        start, ratio = self.word_dropout_start, self.word_dropout_fall_ratio
        if start is None and ratio != type(self).model_fields["word_dropout_fall_ratio"].default:
            raise ValueError(
                f"word_dropout_fall_ratio={ratio} has no effect without word_dropout_start; drop "
                "one or set both"
            )
        if start is not None and start < self.word_dropout:
            raise ValueError(
                f"word_dropout_start={start} is below word_dropout={self.word_dropout}, to which "
                "it falls; raise it"
            )
        return self

    @model_validator(mode="after")
    def _rate_target(self) -> LossConfig:
        """Refuse settings under which no weight of the KL reaches the target."""
        if self.rate_target is None:
            return self
        if self.beta_max == 0:
            raise ValueError(
                f"beta_max=0 with rate_target={self.rate_target}: no weight is left to move; set "
                "beta_max above 0, the most that the controller may set"
            )
        if self.free_bits > 0:
            raise ValueError(
                f"free_bits={self.free_bits} with rate_target={self.rate_target}: KL below the "
                "floor costs nothing at any weight; set free_bits to 0"
            )
        return self

    @property
    def weights(self) -> dict[str, float]:
        """The weight of every term that has a setting `<name>_weight`, by that name."""
        suffix = "_weight"
        return {
            name.removesuffix(suffix): getattr(self, name)
            for name in type(self).model_fields
            if name.endswith(suffix)
        }
