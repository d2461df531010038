"""What lies between a text and the soft prompts: families of latents, one class each.

`kind` tells them apart in a settings file (`"latent": {"kind": "gaussian", "latent_dim": 64}`);
on the command line `--latent KIND` chooses the family, and only its own flags exist.
A new family is a class here and a member of `LatentConfig`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cdpvae.config.base import Group


class GaussianConfig(Group):
    """A diagonal Gaussian posterior over one vector z, the original description's."""

    kind: Literal["gaussian"] = "gaussian"

    latent_dim: int = Field(default=64, ge=1, description="Z, how many numbers z has")
    # The start of logvar and its bounds keep exp(logvar) away from 0 and from overflow.
    logvar_init_bias: float = Field(
        default=-2.0, description="constant bias of the logvar head at the start"
    )
    logvar_clamp: float = Field(default=10.0, gt=0, description="logvar is clamped to [-x, x]")


class NoLatentConfig(Group):
    """No latent: the baseline, the same decoder and trainer without z (a LoRA language model)."""

    kind: Literal["none"] = "none"


# The families there are. Pydantic picks the class by `kind`, the command line by `--latent`.
LatentConfig = Annotated[GaussianConfig | NoLatentConfig, Field(discriminator="kind")]
