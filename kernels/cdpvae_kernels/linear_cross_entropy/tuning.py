"""How the kernels of the reconstruction loss are compiled ahead of time and tuned."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cdpvae_kernels.common.launch_configs import LaunchConfig
from cdpvae_kernels.common.tuning import POINTERS, Shapes, Specialization, Tunable
from cdpvae_kernels.linear_cross_entropy.interface import Options
from cdpvae_kernels.linear_cross_entropy.triton_kernels import (
    error_kernel,
    finish_kernel,
    rows_kernel,
)
from cdpvae_kernels.linear_cross_entropy.triton_launch import (
    OP,
    Coefficients,
    launch_error,
    launch_finish,
    launch_rows,
)

# A minimum that is NaN where one of its operands is.
KEEPS_NAN = "min.NaN.f32"


def specializations() -> dict[str, Specialization]:
    """Describe the kernels for V=128256, D=4096 with bf16 operands.

    fp16 is another kernel: it reads every position's logits twice, see NARROW.
    """
    # The pass over the logits, once for each way it is compiled.
    coefficients = {
        "targets_ptr": "*i64",
        "others_ptr": "*fp32",
        "target_coefficient_ptr": "*fp32",
    }
    out = {}
    for dtype, softcap in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False)):
        name = POINTERS[dtype].strip("*") + (" softcap" if softcap else "")
        out[f"{OP}.rows {name}"] = Specialization(
            rows_kernel,
            f"{OP}.rows",
            {
                "logits_ptr": "*fp32",
                "exps_ptr": POINTERS[dtype],
                "nll_ptr": "*fp32",
                "lse_ptr": "*fp32",
                **coefficients,
                "vocab": "i32",
                "z_loss": "fp32",
                "softcap": "fp32",
            },
            {
                "HAS_SOFTCAP": softcap,
                "IGNORES": softcap,
                "STORE_EXPS": True,
                "NARROW": dtype == torch.float16,
            },
            ("logits_ptr", "exps_ptr", "vocab"),
            # NARROW takes its exponentials in the second pass, which has no minimum.
            keeps_nan=None if dtype == torch.float16 else KEEPS_NAN,
        )

    # The two kernels of the gradients.
    out[f"{OP}.error bf16"] = Specialization(
        error_kernel,
        f"{OP}.error",
        {"exps_ptr": "*bf16", **coefficients, "vocab": "i32"},
        aligned=("exps_ptr", "vocab"),
    )
    out[f"{OP}.finish bf16"] = Specialization(
        finish_kernel,
        f"{OP}.finish",
        {
            "product_ptr": "*fp32",
            "weight_ptr": "*bf16",
            **coefficients,
            "scale_ptr": "*fp32",
            "grad_ptr": "*bf16",
            "width": "i32",
        },
        aligned=("product_ptr", "weight_ptr", "grad_ptr", "width"),
    )
    return out


def tunables(shapes: Shapes, device: torch.device) -> list[Tunable]:
    """Make the three kernels ready to run on one chunk of random logits."""
    # Data of one chunk, as large as a step of training has it.
    positions, vocab, width = shapes.chunk, shapes.vocab, shapes.width
    logits = torch.randn(positions, vocab, device=device)
    weight = torch.randn(vocab, width, dtype=shapes.dtype, device=device)
    exps = torch.ones(positions, vocab, dtype=shapes.dtype, device=device)
    grad = torch.empty(positions, width, dtype=shapes.dtype, device=device)
    product = torch.randn(positions, width, device=device)
    coefficients = Coefficients(
        torch.randint(vocab, (positions,), device=device),
        torch.ones(positions, device=device),
        torch.ones(positions, device=device),
    )
    nll, lse = torch.empty(positions, device=device), torch.empty(positions, device=device)
    scale = torch.ones((), device=device)
    itemsize = shapes.dtype.itemsize

    # The launches take entries by name, the tuner has one configuration at a time.
    def launcher(
        name: str, launch: Callable[[dict[str, LaunchConfig]], None]
    ) -> Callable[[LaunchConfig], None]:
        return lambda config: launch({name: config})

    # Block sizes from far too small to far too large for any architecture.
    return [
        Tunable(
            f"{OP}.rows",
            {
                "BLOCK_V": (1024, 2048, 4096, 8192, 16384),
                "num_warps": (4, 8, 16, 32),
                # Loads that feed no product are not pipelined.
                "num_stages": (1,),
            },
            launcher(
                f"{OP}.rows",
                lambda c: launch_rows(logits, exps, coefficients, nll, lse, Options(), c),
            ),
            positions * vocab * (4 + itemsize),
        ),
        Tunable(
            f"{OP}.error",
            {"BLOCK_V": (1024, 2048, 4096, 8192), "num_warps": (4, 8, 16), "num_stages": (1,)},
            launcher(f"{OP}.error", lambda c: launch_error(exps, coefficients, c)),
            positions * vocab * 2 * itemsize,
        ),
        Tunable(
            f"{OP}.finish",
            {
                "BLOCK_D": (256, 512, 1024, 2048, 4096),
                "num_warps": (1, 2, 4, 8),
                "num_stages": (1,),
            },
            launcher(
                f"{OP}.finish",
                lambda c: launch_finish(product, weight, coefficients, scale, grad, c),
            ),
            positions * width * (4 + 2 * itemsize),
        ),
    ]
