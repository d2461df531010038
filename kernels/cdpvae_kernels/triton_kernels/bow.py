"""The bag-of-words losses on the GPU: what launches `bow_kernels`, how they compile and are tuned.

Legend: B rows, Z latent, V vocabulary, T packed tokens, G programs.

BCE: targets, errors. Categorical: bag, log_sum_exp, errors, cells. Backward, both: head. Any number
of rows: blocks of BLOCK_B in turn, which after the first find the weight in the L2 cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from cdpvae_kernels.launch_configs import LaunchConfig
from cdpvae_kernels.matmul import HALVES
from cdpvae_kernels.triton_kernels import bow_kernels as kernels
from cdpvae_kernels.triton_kernels.packing import search_steps
from cdpvae_kernels.triton_kernels.runtime import (
    POINTERS,
    Shapes,
    Specialization,
    Tunable,
    configuration,
)

# Rows up to which a configuration for few rows is taken: one block of the tensor cores.
FEW_ROWS = 16
# The blocks of the vocabulary are laid out for this latent width and shrink for a wider one.
USUAL_WIDTH = 64
# fp16 holds nothing below 6e-8: errors are at most 1 and are lifted as far as it allows.
LIFT = {torch.float16: 2.0**15}


class Sums(NamedTuple):
    """loss: () fp32, summed over rows. grad_z: (B, Z) fp32 or None. errors: (B, V) or None."""

    loss: Tensor
    grad_z: Tensor | None
    errors: Tensor | None


def bce(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    ids: Tensor,
    cu_seqlens: Tensor,
    want_z: bool,
    want_head: bool,
    configs: dict[str, LaunchConfig] | None = None,
) -> Sums:
    """As `reference.bow_bce` with reduction "sum". configs: another table's entries."""
    if z.shape[0] == 0:
        return _of_no_rows(z, weight, want_z, want_head)
    head = _Head.of(z, weight, bias)
    bits = _launch_targets(head, ids, cu_seqlens, configs)
    return _launch_errors(head, bits, None, want_z, want_head, configs)


def categorical(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    ids: Tensor,
    cu_seqlens: Tensor,
    want_z: bool,
    want_head: bool,
    configs: dict[str, LaunchConfig] | None = None,
) -> Sums:
    """As `reference.bow_categorical`, summed over rows. configs: another table's entries."""
    if z.shape[0] == 0:
        return _of_no_rows(z, weight, want_z, want_head)
    head = _Head.of(z, weight, bias)
    mean_weight, mean_logit = _launch_bag(head, ids, cu_seqlens, configs)
    lse = torch.logsumexp(_launch_log_sum_exp(head, configs), dim=0)
    has_tokens = cu_seqlens.diff() > 0
    loss = torch.where(has_tokens, lse - mean_logit, 0.0).sum()
    if not (want_z or want_head):
        return Sums(loss, None, None)
    # A row without tokens has no gradient: against infinity every probability is 0.
    lse = torch.where(has_tokens, lse, float("inf"))
    _, grad_z, errors = _launch_errors(head, None, lse, want_z, want_head, configs)
    if want_head:
        _launch_cells(head, ids, cu_seqlens, lse, errors, configs)
    return Sums(loss, grad_z.sub_(mean_weight) if want_z else None, errors)


def head_gradients(
    errors: Tensor,
    z: Tensor,
    upstream: Tensor,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    configs: dict[str, LaunchConfig] | None = None,
) -> tuple[Tensor, Tensor]:
    """errors (B, V), z (B, Z), upstream () -> gradients of weight (V, Z) and bias (V,)."""
    (num_rows, vocab), width = errors.shape, z.shape[1]
    grad_weight = torch.empty(vocab, width, dtype=weight_dtype, device=z.device)
    grad_bias = torch.empty(vocab, dtype=bias_dtype, device=z.device)
    config = _by_rows("bow.head", errors, width, "", configs)
    kernels.head_kernel[(triton.cdiv(vocab, config["BLOCK_V"]),)](
        errors,
        z.to(errors.dtype).contiguous(),
        upstream.to(torch.float32),
        grad_weight,
        grad_bias,
        num_rows,
        vocab,
        width,
        LIFT=LIFT.get(weight_dtype, 1.0),
        BLOCK_Z=_block_z(width),
        **config,
    )
    return grad_weight, grad_bias


class _Head(NamedTuple):
    """The operands as the kernels read them: contiguous, z in the dtype of the products.

    That is fp32, unless z and weight have the same half precision.
    """

    z: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, z: Tensor, weight: Tensor, bias: Tensor) -> _Head:
        halves = z.dtype == weight.dtype and z.dtype in HALVES
        z = z.to(z.dtype if halves else torch.float32)
        return cls(z.contiguous(), weight.contiguous(), bias.contiguous())

    @property
    def sizes(self) -> tuple[int, int, int]:
        """B, V, Z."""
        return self.z.shape[0], *self.weight.shape

    @property
    def lift(self) -> float:
        return LIFT.get(self.weight.dtype, 1.0)

    def programs(self, kernel: str, configs) -> tuple[int, LaunchConfig]:
        """How many programs share the vocabulary, and their configuration."""
        # Without tensor cores the products themselves fill the registers.
        suffix = "_fp32" if self.weight.dtype == torch.float32 else ""
        config = _by_rows(kernel, self.z, self.z.shape[1], suffix, configs)
        blocks = triton.cdiv(self.weight.shape[0], config["BLOCK_V"])
        return min(config["PROGRAMS"], blocks), config

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.z.device)


def _of_no_rows(z: Tensor, weight: Tensor, want_z: bool, want_head: bool) -> Sums:
    zero = torch.zeros((), device=z.device)
    grad_z = torch.zeros(z.shape, device=z.device) if want_z else None
    return Sums(zero, grad_z, z.new_empty(0, weight.shape[0]) if want_head else None)


def _launch_targets(head: _Head, ids: Tensor, cu_seqlens: Tensor, configs) -> Tensor:
    """-> bits (B, words) int32."""
    num_rows, vocab, _ = head.sizes
    num_words = triton.cdiv(vocab, kernels.BITS.value)
    bits = torch.zeros(num_rows, num_words, dtype=torch.int32, device=ids.device)
    if ids.numel() == 0:
        return bits
    config = configuration("bow.targets", ids.device, configs)
    kernels.targets_kernel[(triton.cdiv(ids.numel(), config["BLOCK_T"]),)](
        ids.contiguous(),
        cu_seqlens.contiguous(),
        bits,
        ids.numel(),
        num_rows,
        vocab,
        num_words,
        STEPS=search_steps(num_rows),
        **config,
    )
    return bits


def _launch_log_sum_exp(head: _Head, configs) -> Tensor:
    """-> (G, B)."""
    num_rows, vocab, width = head.sizes
    programs, config = head.programs("bow.log_sum_exp", configs)
    out = head.empty(programs, num_rows)
    kernels.log_sum_exp_kernel[(programs,)](
        *head, out, num_rows, vocab, width, BLOCK_Z=_block_z(width), **config
    )
    return out


def _launch_errors(head: _Head, bits, lse, want_z: bool, want_head: bool, configs) -> Sums:
    """With `bits` the BCE; with `lse` the categorical probabilities, whose loss here is 0."""
    num_rows, vocab, width = head.sizes
    programs, config = head.programs("bow.errors", configs)
    loss = head.empty(programs if lse is None else 0)
    grad_z = head.empty(programs, num_rows, width) if want_z else None
    errors = head.empty(num_rows, vocab, dtype=head.z.dtype) if want_head else None
    kernels.errors_kernel[(programs,)](
        *head,
        bits,
        lse,
        loss,
        grad_z,
        errors,
        num_rows,
        vocab,
        width,
        0 if bits is None else bits.shape[1],
        CATEGORICAL=lse is not None,
        WANT_Z=want_z,
        WANT_HEAD=want_head,
        LIFT=head.lift,
        BLOCK_Z=_block_z(width),
        **config,
    )
    return Sums(loss.sum(), grad_z.sum(dim=0) if want_z else None, errors)


def _launch_bag(head: _Head, ids: Tensor, cu_seqlens: Tensor, configs) -> tuple[Tensor, Tensor]:
    """-> (B, Z) and (B,) fp32."""
    num_rows, _, width = head.sizes
    mean_weight, mean_logit = head.empty(num_rows, width), head.empty(num_rows)
    config = configuration("bow.bag", ids.device, configs)
    kernels.bag_kernel[(num_rows,)](
        *head,
        ids.contiguous(),
        cu_seqlens.contiguous(),
        mean_weight,
        mean_logit,
        width,
        BLOCK_Z=_block_z(width),
        **config,
    )
    return mean_weight, mean_logit


def _launch_cells(head: _Head, ids, cu_seqlens, lse, errors, configs) -> None:
    if ids.numel() == 0:
        return
    num_rows, vocab, width = head.sizes
    config = configuration("bow.cells", ids.device, configs)
    kernels.cells_kernel[(triton.cdiv(ids.numel(), config["BLOCK_T"]),)](
        *head,
        ids.contiguous(),
        cu_seqlens.contiguous(),
        lse,
        errors,
        ids.numel(),
        num_rows,
        vocab,
        width,
        STEPS=search_steps(num_rows),
        LIFT=head.lift,
        BLOCK_Z=_block_z(width),
        **config,
    )


def _by_rows(kernel: str, rows: Tensor, width: int, suffix: str, configs) -> LaunchConfig:
    """The configuration for as many rows as the tensor has, its blocks narrowed for a wide z."""
    name = f"{kernel}.{'few' if rows.shape[0] <= FEW_ROWS else 'many'}{suffix}"
    config = configuration(name, rows.device, configs)
    wide = max(_block_z(width) // USUAL_WIDTH, 1)
    return {**config, "BLOCK_V": max(config["BLOCK_V"] // wide, 16)}


def _block_z(width: int) -> int:
    return max(triton.next_power_of_2(width), 16)


def specializations() -> dict[str, Specialization]:
    """Z = 64, V = 128,256; B = 8 and 16 are `few`, 64 and 256 `many`.

    bf16, z in fp32 with a head in bf16 (what the model trains with), fp32.
    """
    half, single = torch.bfloat16, torch.float32
    found = []
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
    _, targets = _specialization(kernels.targets_kernel, "bow.targets", half, half)
    return {"bow.targets": targets, **dict(found)}


def _specialization(
    kernel, config: str, z: torch.dtype, weight: torch.dtype, loss: str | None = None
) -> tuple[str, Specialization]:
    fp32 = ("lse_ptr", "loss_ptr", "grad_z_ptr", "out_ptr", "upstream_ptr")
    fp32 += ("mean_weight_ptr", "mean_logit_ptr")
    head = ("weight_ptr", "bias_ptr", "grad_weight_ptr", "grad_bias_ptr")
    types = {
        **dict.fromkeys(("num_rows", "vocab", "width", "num_words", "num_tokens"), "i32"),
        **dict.fromkeys(("z_ptr", "errors_ptr"), POINTERS[z]),
        **dict.fromkeys(head, POINTERS[weight]),
        **dict.fromkeys(fp32, "*fp32"),
        **{"ids_ptr": "*i64", "cu_seqlens_ptr": "*i32", "bits_ptr": "*i32"},
    }
    constants = {
        "BLOCK_Z": USUAL_WIDTH,
        "LIFT": 1.0,
        "STEPS": search_steps(64),
        "CATEGORICAL": loss == "categorical",
        "WANT_Z": True,
        "WANT_HEAD": True,
    }
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
    """Every kernel on a random head: `few` with 8 rows, `many` with `shapes.rows`."""
    half = shapes.dtype if shapes.dtype in HALVES else torch.float16
    found = []
    for suffix, dtype in (("", half), ("_fp32", torch.float32)):
        found += _rows_tunables(shapes, device, "few", 8, suffix, dtype)
        many = max(shapes.rows, FEW_ROWS + 1)
        found += _rows_tunables(shapes, device, "many", many, suffix, dtype)
    return found + _token_tunables(shapes, device, half)


def _rows_tunables(
    shapes: Shapes, device: torch.device, rows: str, num_rows: int, suffix: str, dtype: torch.dtype
) -> list[Tunable]:
    head, ids, cu_seqlens = _random_problem(shapes, device, num_rows, dtype)
    _, vocab, width = head.sizes
    bits = _launch_targets(head, ids, cu_seqlens, None)
    errors = torch.zeros(num_rows, vocab, dtype=dtype, device=device)
    blocks = {
        "BLOCK_B": (16,) if rows == "few" else (16, 32, 64),
        "BLOCK_V": (32, 64, 128, 256),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3),
    }
    read = (vocab * width + num_rows * vocab) * dtype.itemsize
    name = f"bow.errors.{rows}{suffix}"
    lse_name = f"bow.log_sum_exp.{rows}{suffix}"
    programs = {"PROGRAMS": (132, 264, 396, 528)}
    found = [
        Tunable(
            name,
            blocks | programs,
            lambda config: _launch_errors(head, bits, None, True, True, {name: config}),
            read,
        ),
        Tunable(
            lse_name,
            blocks | programs,
            lambda config: _launch_log_sum_exp(head, {lse_name: config}),
            vocab * width * dtype.itemsize,
        ),
    ]
    if suffix:
        return found
    head_name, one = f"bow.head.{rows}", torch.ones((), device=device)

    def launch_head(config: LaunchConfig) -> None:
        head_gradients(errors, head.z, one, dtype, dtype, {head_name: config})

    return [*found, Tunable(head_name, blocks, launch_head, read)]


def _token_tunables(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> list[Tunable]:
    num_rows = 8
    head, ids, cu_seqlens = _random_problem(shapes, device, num_rows, dtype)
    lse = torch.zeros(num_rows, device=device)
    errors = torch.zeros(num_rows, shapes.vocab, dtype=dtype, device=device)
    blocks = {"num_warps": (1, 2, 4, 8), "num_stages": (1,)}
    gathered = shapes.tokens * shapes.latent * dtype.itemsize
    return [
        Tunable(
            "bow.targets",
            {"BLOCK_T": (64, 128, 256, 512), **blocks},
            lambda config: _launch_targets(head, ids, cu_seqlens, {"bow.targets": config}),
            shapes.tokens * 8 + num_rows * shapes.vocab // 8,
        ),
        Tunable(
            "bow.bag",
            {"BLOCK_T": (16, 32, 64, 128), **blocks, "num_stages": (1, 2, 3)},
            lambda config: _launch_bag(head, ids, cu_seqlens, {"bow.bag": config}),
            gathered,
        ),
        Tunable(
            "bow.cells",
            {"BLOCK_T": (16, 32, 64), **blocks},
            lambda config: _launch_cells(head, ids, cu_seqlens, lse, errors, {"bow.cells": config}),
            2 * gathered,
        ),
    ]


def _random_problem(
    shapes: Shapes, device: torch.device, num_rows: int, dtype: torch.dtype
) -> tuple[_Head, Tensor, Tensor]:
    """A head and `shapes.tokens` ids dealt evenly to the rows."""
    z = torch.randn(num_rows, shapes.latent, device=device).to(dtype)
    weight = torch.randn(shapes.vocab, shapes.latent, device=device).to(dtype)
    ids = torch.randint(shapes.vocab, (shapes.tokens,), device=device)
    cuts = torch.arange(num_rows + 1, device=device) * shapes.tokens // num_rows
    return _Head.of(z, weight, weight[:, 0].contiguous()), ids, cuts.to(torch.int32)
