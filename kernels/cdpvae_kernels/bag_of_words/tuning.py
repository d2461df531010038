"""How the kernels of the bag-of-words losses are compiled ahead of time and tuned."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from cdpvae_kernels.bag_of_words import triton_kernels as kernels
from cdpvae_kernels.bag_of_words.triton_launch import (
    FEW_ROWS,
    USUAL_WIDTH,
    Head,
    block_z,
    head_gradients,
    launch_bag,
    launch_cells,
    launch_errors,
    launch_log_sum_exp,
    launch_targets,
)
from cdpvae_kernels.common.launch_configs import LaunchConfig
from cdpvae_kernels.common.matmul import HALVES
from cdpvae_kernels.common.packing import search_steps
from cdpvae_kernels.common.tuning import POINTERS, Room, Shapes, Specialization, Tunable


def specializations() -> dict[str, Specialization]:
    """Describe the kernels for Z = 64, V = 128,256; B = 8 and 16 are `few`, 64 and 256 `many`.

    In bf16, with z in fp32 and a head in bf16 (what the model trains with), and in fp32.
    """
    # The kernels of rows and of tokens, once for each combination of dtypes.
    half, single = torch.bfloat16, torch.float32
    found: list[tuple[str, Specialization]] = []
    for z, weight in ((half, half), (single, half), (single, single)):
        suffix = "_fp32" if weight == single else ""
        for rows in ("few", "many"):
            for loss in ("bce", "categorical"):
                name = f"bow.errors.{rows}{suffix}"
                found.append(_specialization(kernels.errors_kernel, name, z, weight, loss))
            name = f"bow.log_sum_exp.{rows}{suffix}"
            found.append(_specialization(kernels.log_sum_exp_kernel, name, z, weight))
            name = f"bow.head.{rows}"
            found.append(_specialization(kernels.head_kernel, name, z, weight))
        found.append(_specialization(kernels.bag_kernel, "bow.bag", z, weight))
        found.append(_specialization(kernels.cells_kernel, "bow.cells", z, weight))

    # The targets are integers: one way for all dtypes.
    _, targets = _specialization(kernels.targets_kernel, "bow.targets", half, half)
    return {"bow.targets": targets, **dict(found)}


def _specialization(
    kernel: Any,
    config: str,
    z: torch.dtype,
    weight: torch.dtype,
    loss: str | None = None,
) -> tuple[str, Specialization]:
    """Describe one kernel; returns its name, which tells configuration, dtypes and loss, with it.

    kernel: the function that `triton.jit` returned.
    config: its name in `launch_configs.json`.
    z: the dtype of z and of the errors.
    weight: the dtype of weight, bias and their gradients.
    loss: "bce" or "categorical" for a kernel that both use, else None.
    """
    # The types of all arguments that any of the kernels has, by name.
    fp32 = (
        *("lse_ptr", "loss_ptr", "grad_z_ptr", "out_ptr", "upstream_ptr"),
        *("mean_weight_ptr", "mean_logit_ptr"),
    )
    head = ("weight_ptr", "bias_ptr", "grad_weight_ptr", "grad_bias_ptr")
    types = {
        **dict.fromkeys(("num_rows", "vocab", "width", "num_words", "num_tokens"), "i32"),
        **dict.fromkeys(("z_ptr", "errors_ptr"), POINTERS[z]),
        **dict.fromkeys(head, POINTERS[weight]),
        **dict.fromkeys(fp32, "*fp32"),
        **{"ids_ptr": "*i64", "cu_seqlens_ptr": "*i32", "bits_ptr": "*i32", "counts_ptr": "*i32"},
    }
    constants: dict[str, Any] = {
        "BLOCK_Z": USUAL_WIDTH,
        "LIFT": 1.0,
        "STEPS": search_steps(64),
        "CATEGORICAL": loss == "categorical",
        "WANT_Z": True,
        "WANT_HEAD": True,
    }

    # Of all these the kernel's own.
    names = kernel.arg_names
    divisible = ("vocab", "width", "z_ptr", "errors_ptr", "grad_z_ptr", *head)
    dtypes = " x ".join(dict.fromkeys(POINTERS[d].strip("*") for d in (z, weight)))
    return " ".join(filter(None, (config, dtypes, loss))), Specialization(
        kernel,
        config,
        {name: types[name] for name in names if name in types},
        {name: value for name, value in constants.items() if name in names},
        tuple(name for name in divisible if name in names),
    )


def tunables(shapes: Shapes, device: torch.device) -> list[Tunable]:
    """Make every kernel ready on a random head: `few` with 8 rows, `many` with `shapes.rows`."""
    half = shapes.dtype if shapes.dtype in HALVES else torch.float16
    found: list[Tunable] = []
    for suffix, dtype in (("", half), ("_fp32", torch.float32)):
        found += _rows_tunables(shapes, device, "few", 8, suffix, dtype)
        many = max(shapes.rows, FEW_ROWS + 1)
        found += _rows_tunables(shapes, device, "many", many, suffix, dtype)
    return found + _token_tunables(shapes, device, half)


def _rows_tunables(
    shapes: Shapes,
    device: torch.device,
    rows: str,
    num_rows: int,
    suffix: str,
    dtype: torch.dtype,
) -> list[Tunable]:
    """Make the kernels ready whose configuration depends on the number of rows.

    shapes: vocabulary, latent width and tokens count.
    device: where they run.
    rows: "few" or "many", the part of the configuration's name.
    num_rows: B.
    suffix: "_fp32" for the configurations without tensor cores, else empty.
    dtype: of all operands.
    """
    # A problem, and what the kernels before these would have made of it.
    head, ids, cu_seqlens = _random_problem(shapes, device, num_rows, dtype)
    _, vocab, width = head.sizes
    bits = launch_targets(head, ids, cu_seqlens, None)
    errors = torch.zeros(num_rows, vocab, dtype=dtype, device=device)

    # Forward: the two passes over the vocabulary.
    blocks: dict[str, tuple[int, ...]] = {
        "BLOCK_B": (16,) if rows == "few" else (16, 32, 64),
        "BLOCK_V": (32, 64, 128, 256),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3),
    }
    read = (vocab * width + num_rows * vocab) * dtype.itemsize
    name = f"bow.errors.{rows}{suffix}"
    lse_name = f"bow.log_sum_exp.{rows}{suffix}"
    programs: dict[str, tuple[int, ...]] = {"PROGRAMS": (132, 264, 396, 528)}
    found = [
        Tunable(
            name,
            blocks | programs,
            lambda config: launch_errors(head, bits, None, True, True, {name: config}),
            read,
            partial(_room, width=width, dtype=dtype, errors=True),
        ),
        Tunable(
            lse_name,
            blocks | programs,
            lambda config: launch_log_sum_exp(head, {lse_name: config}),
            vocab * width * dtype.itemsize,
            partial(_room, width=width, dtype=dtype, errors=False),
        ),
    ]

    # Backward: its configurations are the same with and without tensor cores.
    if suffix:
        return found
    head_name, one = f"bow.head.{rows}", torch.ones((), device=device)

    def launch_head(config: LaunchConfig) -> None:
        head_gradients(errors, head.z, one, dtype, dtype, {head_name: config})

    return [*found, Tunable(head_name, blocks, launch_head, read)]


def _room(config: LaunchConfig, *, width: int, dtype: torch.dtype, errors: bool) -> Room:
    """Estimate from below what a block of a pass over the vocabulary takes.

    config: its blocks, warps and stages.
    width: Z.
    dtype: of all operands.
    errors: whether it makes errors and the gradient of z too.
    """
    # At least four tiles of logits are in registers at once, and the gradient of z.
    rows, columns, latent = config["BLOCK_B"], config["BLOCK_V"], block_z(width)
    numbers = 4 * rows * columns + rows * latent
    # z, the tiles of the weight on their way, and the errors as an operand.
    ahead = max(config["num_stages"] - 1, 1)
    shared = rows * latent + ahead * columns * latent + errors * rows * columns
    return Room(numbers, shared * dtype.itemsize)


def _token_tunables(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> list[Tunable]:
    """Make the kernels ready that run over tokens."""
    # A problem of eight rows, and what the kernels before these would have made of it.
    num_rows = 8
    head, ids, cu_seqlens = _random_problem(shapes, device, num_rows, dtype)
    lse, counts = torch.zeros(num_rows, device=device), cu_seqlens.diff()
    errors = torch.zeros(num_rows, shapes.vocab, dtype=dtype, device=device)

    # Small programs: each reads a handful of tokens. Loads that feed no product are not pipelined,
    # so that stages would change nothing.
    blocks: dict[str, tuple[int, ...]] = {"num_warps": (1, 2, 4, 8), "num_stages": (1,)}
    gathered = shapes.tokens * shapes.latent * dtype.itemsize
    return [
        Tunable(
            "bow.targets",
            {"BLOCK_T": (64, 128, 256, 512), **blocks},
            lambda config: launch_targets(head, ids, cu_seqlens, {"bow.targets": config}),
            shapes.tokens * 8 + num_rows * shapes.vocab // 8,
        ),
        Tunable(
            "bow.bag",
            {"BLOCK_T": (16, 32, 64, 128), **blocks},
            lambda config: launch_bag(head, ids, cu_seqlens, {"bow.bag": config}),
            gathered,
        ),
        Tunable(
            "bow.cells",
            {"BLOCK_T": (16, 32, 64), **blocks},
            lambda config: launch_cells(
                head, ids, cu_seqlens, lse, counts, errors, {"bow.cells": config}
            ),
            2 * gathered,
        ),
    ]


def _random_problem(
    shapes: Shapes, device: torch.device, num_rows: int, dtype: torch.dtype
) -> tuple[Head, Tensor, Tensor]:
    """Draw a head, `shapes.tokens` ids dealt evenly to the rows, and the rows' offsets."""
    # Logits of random data: what the kernels cost does not depend on the numbers.
    z = torch.randn(num_rows, shapes.latent, device=device).to(dtype)
    weight = torch.randn(shapes.vocab, shapes.latent, device=device).to(dtype)
    ids = torch.randint(shapes.vocab, (shapes.tokens,), device=device)
    cuts = torch.arange(num_rows + 1, device=device) * shapes.tokens // num_rows
    return Head.of(z, weight, weight[:, 0].contiguous()), ids, cuts.to(torch.int32)
