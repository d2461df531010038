"""The interface of the original description, on top of the live one.

The original description of the system (docs/architecture.md) names classes and signatures of its
own: padded tensors, a loss that is called with keywords, a monitor that is shown `mu` and `logvar`.
They stay importable from `cdpvae` and do what it says. Nothing else in the package uses them.
"""

from cdpvae.compatibility.collapse import (
    AdaptiveInterventionScheduler,
    CollapseMetrics,
    CollapseMonitor,
)
from cdpvae.compatibility.counter import ActiveUnitsCounter
from cdpvae.compatibility.forward import forward
from cdpvae.compatibility.loss import (
    FreeBitsKL,
    InfoNCELoss,
    MomentumQueue,
    SoftPromptVAELoss,
    compute_bow_loss,
)
from cdpvae.compatibility.metrics import LatentStatistics
from cdpvae.compatibility.output import LossTerms, StepPlan, VAEOutput
from cdpvae.compatibility.padding import DynamicPaddingCollator, TextAugmenter
from cdpvae.compatibility.texts import InstructionDataset

__all__ = [
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
    "forward",
]
