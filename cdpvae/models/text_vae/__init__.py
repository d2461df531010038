"""The network: tensor in, tensor out; it knows nothing of files beyond its own, ranks or steps."""

from cdpvae.models.text_vae.backbone import Backbone, check_vocabulary
from cdpvae.models.text_vae.encoders.pooling import AttentionPooling, VariationalEncoder
from cdpvae.models.text_vae.prompts import DeepPrefixProjector, SoftPromptProjector
from cdpvae.models.text_vae.vae import LlamaSoftPromptVAE, VAEOutput

__all__ = [
    "AttentionPooling",
    "Backbone",
    "DeepPrefixProjector",
    "LlamaSoftPromptVAE",
    "SoftPromptProjector",
    "VAEOutput",
    "VariationalEncoder",
    "check_vocabulary",
]
