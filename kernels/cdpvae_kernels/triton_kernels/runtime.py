"""What all kernels share: the interpreter's state, the dtype names, a specialization's description.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton import knobs

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
    hot: spills are not accepted.
    """

    kernel: Any
    config: str
    signature: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    hot: bool = True


def interpreting() -> bool:
    """True when TRITON_INTERPRET=1 was set as Triton was imported: kernels run on CPU tensors."""
    return knobs.runtime.interpret


def fitted(config: dict[str, int], **extents: int) -> dict[str, int]:
    """The configuration with no block larger than its extent rounded up to a power of two."""
    capped = {
        name: min(config[name], max(triton.next_power_of_2(extent), 16))
        for name, extent in extents.items()
    }
    return {**config, **capped}
