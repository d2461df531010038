"""Flags that the evaluation commands have in common."""

from __future__ import annotations

import dataclasses
from typing import Literal

Split = Literal["train", "validation"]


@dataclasses.dataclass
class EvaluationOptions:
    """Which checkpoint, which rows, and where it runs."""

    checkpoint: str = ""
    """checkpoint-N directory of a training run"""
    baseline: tuple[str, ...] = ()
    """checkpoint-N of --latent none runs on the same data, one of each --decoder-reads at most"""
    num_rows: int = 1000
    """rows that are measured; their number's log caps the mutual information"""
    split: Split = "validation"
    """which part of the processed data"""
    processed_dir: str | None = None
    """default: the data the run was trained on"""
    rows_per_batch: int = 32
    """rows that go through the model together"""
    seed: int = 0
    """of posterior noise and prior draws"""
    backbone: str | None = None
    """the base weights, where they moved since training"""
    device: str | None = None
    """where to run; default: CUDA where there is one"""

    def require_checkpoint(self) -> None:
        """Raise ValueError where no checkpoint is named."""
        if not self.checkpoint:
            raise ValueError("--checkpoint is needed: a checkpoint-N directory")


@dataclasses.dataclass
class GenerateOptions:
    """What to write, and how."""

    checkpoint: str = ""
    """checkpoint-N directory of a training run"""
    text: tuple[str, ...] = ()
    """instructions to encode; each is answered from the mean of its code"""
    interpolate: bool = False
    """walk from the first --text to the second"""
    num_steps: int = 7
    """latents on that walk, ends included"""
    mode: str = "slerp"
    """linear or slerp"""
    samples: int = 0
    """texts from z drawn from the prior"""
    max_length: int = 256
    """tokens per text"""
    temperature: float = 0.0
    """0 is greedy"""
    top_p: float = 1.0
    """nucleus of the sampling"""
    seed: int = 0
    """of prior draws and sampling"""
    backbone: str | None = None
    """the base weights, where they moved since training"""
    device: str | None = None
    """where to run; default: CUDA where there is one"""

    def check(self) -> None:
        """Raise ValueError for options that ask for nothing or contradict each other."""
        if not self.checkpoint:
            raise ValueError("--checkpoint is needed: a checkpoint-N directory")
        if self.interpolate and len(self.text) != 2:
            raise ValueError(
                f"--interpolate walks between two texts; --text gives {len(self.text)}"
            )
        if bool(self.samples) == bool(self.text):
            raise ValueError("give either --text or --samples")
