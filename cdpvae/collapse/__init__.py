"""Posterior collapse: `monitor` says what is happening, `intervention` what to do about it.

`use` keeps the measured use of z, the first signal of the monitor where it is watched.
"""

from cdpvae.collapse.intervention import AdaptiveInterventionScheduler, Intervention
from cdpvae.collapse.monitor import CollapseMetrics, CollapseMonitor, Level
from cdpvae.collapse.use import Use, UseWindow

__all__ = [
    "AdaptiveInterventionScheduler",
    "CollapseMetrics",
    "CollapseMonitor",
    "Intervention",
    "Level",
    "Use",
    "UseWindow",
]
