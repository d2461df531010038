"""How a kernel is described to the compiler and to the tuner, and where the descriptions are."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

import cdpvae_kernels
from cdpvae_kernels.common.launch_configs import LaunchConfig

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Specialization:
    """One way a kernel is launched, complete enough to compile it without a GPU.

    config: its name in `launch_configs.json`. signature: type of every argument that is no
    constexpr ("*bf16", "i32", "fp32"). constants: the constexprs that no configuration sets.
    aligned: arguments whose value or address is a multiple of 16, as Triton finds at a launch.
    hot: spills are not accepted. options: those of the compiler that no configuration sets.
    """

    kernel: Any
    config: str
    signature: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    hot: bool = True
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Shapes:
    """What the tuner runs the kernels on; the defaults are those of an 8B Llama.

    rows: BoW rows (B). chunk: rows of logits held at a time. tokens: packed tokens.
    """

    vocab: int = 128256
    width: int = 4096
    latent: int = 64
    rows: int = 64
    chunk: int = 1024
    tokens: int = 8192
    prompts: int = 32
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Tunable:
    """A kernel on data of its own, ready to run with any configuration.

    config: its name in `launch_configs.json`. candidates: values to try for each of its entries.
    launch: run once. bytes: read and written by one launch.
    """

    config: str
    candidates: dict[str, tuple[int, ...]]
    launch: Callable[[LaunchConfig], None]
    bytes: int


def tuning_modules() -> list[ModuleType]:
    """Import `tuning.py` of every operation, in the order of the operations' names."""
    packages = [
        entry.name for entry in pkgutil.iter_modules(cdpvae_kernels.__path__) if entry.ispkg
    ]
    return [
        importlib.import_module(f"cdpvae_kernels.{operation}.tuning")
        for operation in packages
        if operation != "common"
    ]
