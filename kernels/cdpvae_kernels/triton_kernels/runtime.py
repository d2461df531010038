"""What all kernels share: how one is described to the compiler and to the tuner, block sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton import knobs

from cdpvae_kernels.launch_configs import LaunchConfig, launch_config

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


def interpreting() -> bool:
    """True when TRITON_INTERPRET=1 was set as Triton was imported: kernels run on CPU tensors."""
    return knobs.runtime.interpret


def configuration(
    name: str,
    device: torch.device,
    configs: dict[str, LaunchConfig] | None = None,
    **extents: int,
) -> LaunchConfig:
    """How to launch the kernel called `name`: an entry of `configs`, else of the table.

    No block becomes larger than its extent, given by name, rounded up to a power of two.
    """
    config = (configs or {}).get(name) or launch_config(name, device)
    capped = {
        block: min(config[block], max(triton.next_power_of_2(extent), 16))
        for block, extent in extents.items()
    }
    return {**config, **capped}
