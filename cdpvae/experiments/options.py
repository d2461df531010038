"""Flags of the sweep beside the settings of training."""

from __future__ import annotations

import dataclasses
import re

import tyro


@dataclasses.dataclass
class SweepOptions:
    """What varies, and where the result goes."""

    vary: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """KEY=V1,V2,...: a setting, such as loss.beta_max, and its values; several give the product"""
    seeds: str = "0"
    """seeds of training, such as 0,1,2"""
    output: str = ""
    """directory of the sweep: table, picture, settings, logs and runs"""
    launch: str | None = None
    """words that start a module, such as "deepspeed --num_accelerators 2 --module" """
    devices: str | None = None
    """CUDA devices such as 0,1, a run on each at a time; default: one run after another"""
    baseline: str | None = None
    """checkpoint-N of a --latent none run on the same data"""
    num_rows: int = 1000
    """validation rows that are measured, and among which z is shuffled"""
    rows_per_batch: int = 32
    """rows that go through the model together"""
    published: str | None = None
    """JSON list of {"name", "kl", "nll"}: rows of papers, drawn into the picture"""

    def check(self) -> list[str | None]:
        """Return the devices. Raises ValueError for options that are missing or contradict."""
        if not self.output:
            raise ValueError("--output is needed: a directory for the sweep")
        if not self.vary:
            raise ValueError("--vary is needed: KEY=V1,V2,..., such as loss.beta_max=0.3,1")
        for name in ("num_rows", "rows_per_batch"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        # A launcher chooses its devices itself.
        if self.devices is None:
            return [None]
        if self.launch is not None:
            raise ValueError(
                f"--devices {self.devices} has no effect with --launch; name the devices in its "
                "words, or drop one of the two"
            )
        devices = self.devices.split(",")
        if not all(re.fullmatch(r"\d+", d) for d in devices) or len({*devices}) < len(devices):
            raise ValueError(f"--devices {self.devices}: must be different numbers, such as 0,1")
        return list(devices)
