"""How the kernels of the reconstruction loss are compiled ahead of time and tuned."""

from __future__ import annotations

import torch

from cdpvae_kernels.common.tuning import POINTERS, Shapes, Specialization, Tunable
from cdpvae_kernels.linear_cross_entropy.triton_kernels import (
    error_kernel,
    finish_kernel,
    rows_kernel,
)
from cdpvae_kernels.linear_cross_entropy.triton_launch import (
    OP,
    launch_error,
    launch_finish,
    launch_rows,
)


def specializations() -> dict[str, Specialization]:
    """For V=128256, D=4096 with bf16 operands; fp16 reads every row twice, see NARROW."""
    per_row = {
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
                **per_row,
                "vocab": "i32",
                "z_loss": "fp32",
                "softcap": "fp32",
            },
            {"HAS_SOFTCAP": softcap, "STORE_EXPS": True, "NARROW": dtype == torch.float16},
            ("logits_ptr", "exps_ptr", "vocab"),
        )
    out[f"{OP}.error bf16"] = Specialization(
        error_kernel,
        f"{OP}.error",
        {"exps_ptr": "*bf16", **per_row, "vocab": "i32"},
        aligned=("exps_ptr", "vocab"),
    )
    out[f"{OP}.finish bf16"] = Specialization(
        finish_kernel,
        f"{OP}.finish",
        {
            "product_ptr": "*fp32",
            "weight_ptr": "*bf16",
            **per_row,
            "scale_ptr": "*fp32",
            "grad_ptr": "*bf16",
            "width": "i32",
        },
        aligned=("product_ptr", "weight_ptr", "grad_ptr", "width"),
    )
    return out


def tunables(shapes: Shapes, device: torch.device) -> list[Tunable]:
    """The three kernels on one chunk of random logits."""
    rows, vocab, width = shapes.chunk, shapes.vocab, shapes.width
    fp32 = {"dtype": torch.float32, "device": device}
    draw = {"dtype": shapes.dtype, "device": device}
    logits, weight = torch.randn(rows, vocab, **fp32), torch.randn(vocab, width, **draw)
    exps, grad = torch.ones(rows, vocab, **draw), torch.empty(rows, width, **draw)
    product = torch.randn(rows, width, **fp32)
    targets = torch.randint(vocab, (rows,), device=device)
    per_row = (targets, torch.ones(rows, **fp32), torch.ones(rows, **fp32))
    nll, lse, scale = torch.empty(rows, **fp32), torch.empty(rows, **fp32), torch.ones((), **fp32)
    half = shapes.dtype.itemsize

    def launcher(name, launch):
        return lambda config: launch({f"{OP}.{name}": config})

    return [
        Tunable(
            f"{OP}.rows",
            {
                "BLOCK_V": (1024, 2048, 4096, 8192, 16384),
                "num_warps": (4, 8, 16, 32),
                "num_stages": (1, 2, 3),
            },
            launcher(
                "rows",
                lambda c: launch_rows(logits, exps, per_row, nll, lse, 0.0, None, c),
            ),
            rows * vocab * (4 + half),
        ),
        Tunable(
            f"{OP}.error",
            {"BLOCK_V": (1024, 2048, 4096, 8192), "num_warps": (4, 8, 16), "num_stages": (1,)},
            launcher("error", lambda c: launch_error(exps, per_row, c)),
            rows * vocab * 2 * half,
        ),
        Tunable(
            f"{OP}.finish",
            {
                "BLOCK_D": (256, 512, 1024, 2048, 4096),
                "num_warps": (1, 2, 4, 8),
                "num_stages": (1,),
            },
            launcher(
                "finish",
                lambda c: launch_finish(product, weight, per_row, scale, grad, c),
            ),
            rows * width * (4 + 2 * half),
        ),
    ]
