"""Posterior collapse: `monitor` says what is happening, `intervention` what to do about it."""

from cdpvae.collapse.intervention import AdaptiveInterventionScheduler, Intervention
from cdpvae.collapse.monitor import CollapseMetrics, CollapseMonitor, Level

__all__ = [
    "AdaptiveInterventionScheduler",
    "CollapseMetrics",
    "CollapseMonitor",
    "Intervention",
    "Level",
]
