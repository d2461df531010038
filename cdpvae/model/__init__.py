"""The network: tensor in, tensor out; it knows nothing of files beyond its own, ranks or steps."""

from cdpvae.model.backbone import Backbone, check_vocabulary
from cdpvae.model.posterior import AttentionPooling, VariationalEncoder
from cdpvae.model.prompts import DeepPrefixProjector, SoftPromptProjector
from cdpvae.model.vae import LlamaSoftPromptVAE, VAEOutput

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
