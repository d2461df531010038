"""Flags of the commands `encode` and `decode`."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import tyro


@dataclasses.dataclass
class EncodeOptions:
    """What is encoded, by which checkpoint, and where the codes go."""

    checkpoint: str = ""
    """checkpoint-N directory of a training run"""
    input: str = ""
    """file of any kind that preprocess reads"""
    output: str = ""
    """Parquet file of the codes"""
    with_text: bool = False
    """also write the texts, in a column `text`"""
    rows_per_batch: int = 32
    """rows that go through the model together"""
    part_records: int = 8192
    """records of a part: what a killed run loses, and what is sorted by length"""
    backbone: str | None = None
    """the base weights, where they moved since training"""
    device: str | None = None
    """where to run; default: CUDA where there is one"""

    def check(self) -> None:
        """Raise ValueError for a missing flag or a number below 1."""
        _require(self, ("checkpoint", "input", "output"), ("rows_per_batch", "part_records"))


@dataclasses.dataclass
class DecodeOptions:
    """Which codes are written as text, how, and where the texts go."""

    checkpoint: str = ""
    """checkpoint-N directory of a training run"""
    input: str = ""
    """Parquet file that encode wrote"""
    output: str = ""
    """JSON lines: id and text"""
    any_checkpoint: bool = False
    """also decode codes that another checkpoint made, as long as family and shapes fit"""
    source: Annotated[Literal["mean", "sample"], tyro.conf.arg(name="from")] = "mean"
    """the mean of each code, or a draw from it"""
    max_length: int = 256
    """tokens per text"""
    temperature: float = 0.0
    """0 is greedy"""
    top_p: float = 1.0
    """nucleus of the sampling"""
    seed: int = 0
    """of draws from codes and of the sampling"""
    rows_per_batch: int = 32
    """rows that are written together"""
    backbone: str | None = None
    """the base weights, where they moved since training"""
    device: str | None = None
    """where to run; default: CUDA where there is one"""

    def check(self) -> None:
        """Raise ValueError for a missing flag or a number below 1."""
        _require(self, ("checkpoint", "input", "output"), ("rows_per_batch", "max_length"))


def _require(
    options: EncodeOptions | DecodeOptions, texts: tuple[str, ...], numbers: tuple[str, ...]
) -> None:
    """Raise ValueError for the first flag that is empty, or below 1."""
    for name in texts:
        if not getattr(options, name):
            raise ValueError(f"--{name} is needed; see --help")
    for name in numbers:
        if getattr(options, name) < 1:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag}={getattr(options, name)} must be at least 1")
