"""cdpvae: a Llama with a latent space.

A text goes in; a small Gaussian code z comes out; a Llama, conditioned on z through soft prompts,
writes text back.

    from cdpvae import LlamaSoftPromptVAE, ModelConfig

Names load on first use, so that `import cdpvae` costs nothing and needs no heavy dependency.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "cdpvae.config": (
        "AugmentationConfig",
        "CollapseConfig",
        "DataConfig",
        "LossConfig",
        "ModelConfig",
        "Settings",
        "SettingsError",
        "TrainingConfig",
    ),
    "cdpvae.batch": ("PackedText", "SpecialTokens", "StepSchedule", "Term", "VAEBatch"),
    "cdpvae.models.text_vae": (
        "AttentionPooling",
        "DeepPrefixProjector",
        "LlamaSoftPromptVAE",
        "SoftPromptProjector",
    ),
    "cdpvae.latents": ("Posterior",),
    "cdpvae.latents.gaussian": ("VariationalEncoder",),
    "cdpvae.loss": ("CyclicalAnnealingSchedule",),
    "cdpvae.metrics": ("ReconstructionMetrics",),
    "cdpvae.data": (
        "LlamaTokenizerWrapper",
        "PreprocessedDataset",
        "VAECollator",
    ),
    # The original description's own interface.
    "cdpvae.compatibility": (
        "ActiveUnitsCounter",
        "AdaptiveInterventionScheduler",
        "CollapseMetrics",
        "CollapseMonitor",
        "DynamicPaddingCollator",
        "FreeBitsKL",
        "InfoNCELoss",
        "InstructionDataset",
        "LatentStatistics",
        "LossTerms",
        "MomentumQueue",
        "SoftPromptVAELoss",
        "StepPlan",
        "TextAugmenter",
        "VAEOutput",
        "compute_bow_loss",
    ),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = ["__version__", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'cdpvae' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
