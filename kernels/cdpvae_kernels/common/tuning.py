"""How a kernel is described to the compiler and to the tuner, and where the descriptions are.

Every operation has a file `tuning.py` with `specializations()`, the ways its kernels are compiled
for the shapes of an 8B Llama, which `python -m cdpvae_kernels.resources` needs to count registers
without a GPU, and `tunables(shapes, device)`, its kernels on data of their own, which
`python -m cdpvae_kernels.tune` measures. Importing such a file imports Triton.
"""

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

# Per thread, on every architecture (CUDA programming guide, compute capabilities).
MAX_REGISTERS = 255
# How the compiler calls a pointer to elements of a dtype.
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

    kernel: the function that `triton.jit` returned.
    config: its name in `launch_configs.json`.
    signature: type of every argument that is no constexpr ("*bf16", "i32", "fp32").
    constants: the constexprs that no configuration sets.
    aligned: arguments whose value or address is a multiple of 16, as Triton finds at a launch.
    hot: spills are not accepted.
    keeps_nan: an instruction that its PTX must hold, without which NaN would become a number.
    options: those of the compiler that no configuration sets.
    """

    kernel: Any
    config: str
    signature: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    hot: bool = True
    keeps_nan: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Shapes:
    """What the tuner runs the kernels on; the defaults are those of an 8B Llama.

    vocab: V. width: D, the hidden size. latent: Z.
    rows: B of the bag-of-words losses.
    chunk: positions whose logits are held at a time.
    tokens: packed tokens.
    prompts: P, soft prompts of a sequence.
    dtype: of the operands.
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
class Room:
    """What a block of a kernel takes.

    numbers: of 32 bits, held in registers at once.
    shared: bytes of shared memory.
    """

    numbers: int
    shared: int


@dataclass(frozen=True)
class Tunable:
    """A kernel on data of its own, ready to run with any configuration.

    config: its name in `launch_configs.json`.
    candidates: values to try for each entry of the configuration.
    launch: run once with a configuration.
    bytes: read and written by one launch.
    room: what a block needs with a configuration, estimated from below; what cannot fit is not
        compiled, which takes the longest there.
    """

    config: str
    candidates: dict[str, tuple[int, ...]]
    launch: Callable[[LaunchConfig], object]
    bytes: int
    room: Callable[[LaunchConfig], Room] | None = None

    def fits(self, config: LaunchConfig, shared_limit: float) -> bool:
        """Say whether a block may have room on a GPU that gives it `shared_limit` bytes."""
        if self.room is None:
            return True
        room = self.room(config)
        registers = config["num_warps"] * 32 * MAX_REGISTERS
        return room.numbers <= registers and room.shared <= shared_limit


def tuning_modules() -> list[ModuleType]:
    """Import `tuning.py` of every operation, in the order of the operations' names."""
    operations = [
        entry.name
        for entry in pkgutil.iter_modules(cdpvae_kernels.__path__)
        if entry.ispkg and entry.name != "common"
    ]
    return [importlib.import_module(f"cdpvae_kernels.{name}.tuning") for name in operations]
