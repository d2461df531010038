"""How the kernel of the Philox draws is compiled ahead of time and tuned."""

from __future__ import annotations

import torch

from cdpvae_kernels.common.tuning import Shapes, Specialization, Tunable
from cdpvae_kernels.philox.triton_kernels import draw_kernel
from cdpvae_kernels.philox.triton_launch import LAUNCH_OPTIONS, draw


def specializations() -> dict[str, Specialization]:
    """Describe the kernel that returns words and the one that returns normals."""
    names = ("seed", "sample_step", "epoch_step", "position_step", "size")
    signature = {"sample_ptr": "*i64", "epoch_ptr": "*i64", "position_ptr": "*i64"}
    signature |= {"stream": "i32", **dict.fromkeys(names, "i64")}
    return {
        f"philox.draw {name}": Specialization(
            draw_kernel,
            "philox.draw",
            {**signature, "out_ptr": "*fp32" if normal else "*i64"},
            {"NORMAL": normal},
            options=LAUNCH_OPTIONS,
        )
        for name, normal in (("bits", False), ("normal", True))
    }


def tunables(shapes: Shapes, device: torch.device) -> list[Tunable]:
    """Make the kernel ready to draw the posterior noise of a batch."""
    rows, latent = shapes.rows, shapes.latent
    sample = torch.arange(rows, device=device)[:, None]
    epoch = torch.zeros((), dtype=torch.int64, device=device)
    position = torch.arange(latent, device=device)[None, :]
    return [
        Tunable(
            "philox.draw",
            {"BLOCK": (64, 128, 256, 512), "num_warps": (1, 2, 4, 8), "num_stages": (1,)},
            lambda config: draw(sample, epoch, position, 7, 0, True, {"philox.draw": config}),
            rows * latent * 20,
        )
    ]
