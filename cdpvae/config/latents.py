"""What lies between a text and the soft prompts: families of latents, one class each.

`kind` tells them apart in a settings file (`"latent": {"kind": "gaussian", "latent_dim": 64}`);
on the command line `--latent KIND` chooses the family, and only its own flags exist.
A new family is a class here and a member of `LatentConfig`.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from cdpvae.config.base import Group

PosteriorKind = Literal["free", "batch_norm", "delta", "mu_forcing"]


class GaussianConfig(Group):
    """A diagonal Gaussian posterior over one vector z, the original description's."""

    kind: Literal["gaussian"] = "gaussian"

    latent_dim: int = Field(default=64, ge=1, description="Z, how many numbers z has")
    # The start of logvar and its bounds keep exp(logvar) away from 0 and from overflow.
    logvar_init_bias: float = Field(
        default=-2.0, description="constant bias of the logvar head at the start"
    )
    logvar_clamp: float = Field(default=10.0, gt=0, description="logvar is clamped to [-x, x]")
    # What keeps the posterior away from the prior by its form, whatever the weight of the KL.
    posterior: PosteriorKind = Field(
        default="free",
        description="what holds committed_rate: nothing, batch norm on mu (BN-VAE), bounds of the "
        "variance (delta-VAE) or a penalty on small mu",
    )
    committed_rate: float = Field(
        default=0.0,
        ge=0,
        description="least KL that the posterior is held to, nats per dimension; BN: gamma^2/2",
    )

    @model_validator(mode="after")
    def _commitment(self) -> GaussianConfig:
        """Refuse a floor without what holds it, and bounds of the variance that are empty."""
        rate, kind = self.committed_rate, self.posterior
        if (rate > 0) != (kind != "free"):
            raise ValueError(
                f"committed_rate={rate} with posterior={kind!r}: a rate above 0 needs batch_norm, "
                "delta or mu_forcing, and each of these needs a rate above 0"
            )
        # The KL of a variance at the lower clamp; no posterior with mu = 0 has more.
        most = 0.5 * (math.exp(-self.logvar_clamp) - 1 + self.logvar_clamp)
        if kind == "delta" and rate >= most:
            raise ValueError(
                f"committed_rate={rate} with posterior='delta': logvar_clamp={self.logvar_clamp} "
                f"leaves at most {most:.2f} nats; lower the rate or raise the clamp"
            )
        return self


class NoLatentConfig(Group):
    """No latent: the baseline, the same decoder and trainer without z (a LoRA language model)."""

    kind: Literal["none"] = "none"


# The families there are. Pydantic picks the class by `kind`, the command line by `--latent`.
LatentConfig = Annotated[GaussianConfig | NoLatentConfig, Field(discriminator="kind")]
