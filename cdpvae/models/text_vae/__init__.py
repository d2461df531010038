"""The text VAE: tensor in, tensor out; it knows no files beyond its own, no ranks and no steps."""

from cdpvae.models.text_vae.backbone import Backbone, check_vocabulary
from cdpvae.models.text_vae.encoders.pooling import AttentionPooling
from cdpvae.models.text_vae.prompts import DeepPrefixProjector, SoftPromptProjector
from cdpvae.models.text_vae.vae import Decoded, LlamaSoftPromptVAE, ModelOutput

__all__ = [
    "AttentionPooling",
    "Backbone",
    "Decoded",
    "DeepPrefixProjector",
    "LlamaSoftPromptVAE",
    "ModelOutput",
    "SoftPromptProjector",
    "check_vocabulary",
]
