"""What lies between a pooled text and the projector, one family a file.

A family says how a text becomes a code (`infer`), a code a z (`sample`, `mean`), what using the
latent costs (`penalties`), how likely a z is (`log_q`, `prior`), and how to see that the family is
well (`health`). The model, the losses, the monitor and the evaluation use this interface and read
no field of a code.
"""

from __future__ import annotations

from cdpvae.config import ModelConfig
from cdpvae.latents.base import Code, Latent
from cdpvae.latents.gaussian import Gaussian, Posterior
from cdpvae.latents.information import MutualInformation
from cdpvae.latents.noise import GeneratorNoise, KeyedNoise, Noise
from cdpvae.latents.none import NoLatent
from cdpvae.latents.priors.base import Prior

# A new family is a file, its settings in `config/latents.py`, and a line here.
FAMILIES: dict[str, type[Latent]] = {"gaussian": Gaussian, "none": NoLatent}


def family_of(config: ModelConfig) -> type[Latent]:
    """Return the class of the configured family."""
    return FAMILIES[config.latent.kind]


__all__ = [
    "FAMILIES",
    "Code",
    "Gaussian",
    "GeneratorNoise",
    "KeyedNoise",
    "Latent",
    "MutualInformation",
    "NoLatent",
    "Noise",
    "Posterior",
    "Prior",
    "family_of",
]
