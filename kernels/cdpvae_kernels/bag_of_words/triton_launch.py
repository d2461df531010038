"""The bag-of-words losses on the GPU: what launches `triton_kernels`.

Legend: B rows, Z latent, V vocabulary, T packed tokens, G programs.

BCE: targets, errors. Categorical: bag, log_sum_exp, errors, cells. Backward, both: head. Any number
of rows: blocks of BLOCK_B in turn, which after the first find the weight in the L2 cache.

Every function takes `configs`, entries that count before those of the table, for tests and tuning.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from cdpvae_kernels.bag_of_words import triton_kernels as kernels
from cdpvae_kernels.common.launch_configs import LaunchConfig
from cdpvae_kernels.common.matmul import HALVES
from cdpvae_kernels.common.packing import search_steps
from cdpvae_kernels.common.runtime import configuration

# Up to so many rows a configuration for few rows is taken: one block of the tensor cores.
FEW_ROWS = 16
# The blocks of the vocabulary are laid out for this latent width and shrink for a wider one.
USUAL_WIDTH = 64
# fp16 holds nothing below 6e-8: errors are at most 1 and are lifted as far as it allows.
LIFT = {torch.float16: 2.0**15}

# Launch configurations by the names of their kernels.
Configs = dict[str, LaunchConfig] | None


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
    configs: Configs = None,
) -> Sums:
    """Compute what `reference.bow_bce` does with reduction "sum", and its gradients.

    z, weight, bias, ids, cu_seqlens: as the public function takes them.
    want_z: whether to compute the gradient of z.
    want_head: whether to compute the errors, of which `head_gradients` makes the head's gradients.
    """
    if z.shape[0] == 0:
        return _of_no_rows(z, weight, want_z, want_head)
    head = Head.of(z, weight, bias)
    bits = launch_targets(head, ids, cu_seqlens, configs)
    return launch_errors(head, bits, None, want_z, want_head, configs)


def categorical(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    ids: Tensor,
    cu_seqlens: Tensor,
    want_z: bool,
    want_head: bool,
    configs: Configs = None,
) -> Sums:
    """Compute what `reference.bow_categorical` does, summed over rows, and its gradients.

    z, weight, bias, ids, cu_seqlens: as the public function takes them.
    want_z: whether to compute the gradient of z.
    want_head: whether to compute the errors, of which `head_gradients` makes the head's gradients.
    """
    # The loss: each row's log-sum-exp less the mean logit of its tokens.
    if z.shape[0] == 0:
        return _of_no_rows(z, weight, want_z, want_head)
    head = Head.of(z, weight, bias)
    mean_weight, mean_logit, counts = launch_bag(head, ids, cu_seqlens, configs)
    lse = torch.logsumexp(launch_log_sum_exp(head, configs), dim=0)
    has_tokens = counts > 0
    loss = torch.where(has_tokens, lse - mean_logit, 0.0).sum()
    if not (want_z or want_head):
        return Sums(loss, None, None)

    # The gradients: of the log-sum-exp first, then what the row's own tokens take off.
    # A row without tokens has no gradient: against infinity every probability is 0.
    lse = torch.where(has_tokens, lse, float("inf"))
    _, grad_z, errors = launch_errors(head, None, lse, want_z, want_head, configs)
    if errors is not None:
        launch_cells(head, ids, cu_seqlens, lse, counts, errors, configs)
    if grad_z is not None:
        grad_z.sub_(mean_weight)
    return Sums(loss, grad_z, errors)


def head_gradients(
    errors: Tensor,
    z: Tensor,
    upstream: Tensor,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    configs: Configs = None,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of weight (V, Z) and bias (V,) from the errors of a forward pass.

    errors (B, V): as `Sums` has them.
    z (B, Z): float.
    upstream (): the gradient of the loss.
    weight_dtype: of the weight and its gradient.
    bias_dtype: of the bias and its gradient.
    """
    (num_rows, vocab), width = errors.shape, z.shape[1]
    # The kernel writes every element of both, so nothing is filled before.
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
        BLOCK_Z=block_z(width),
        **config,
    )
    return grad_weight, grad_bias


class Head(NamedTuple):
    """The operands as the kernels read them: contiguous, z in the dtype of the products.

    That is fp32, unless z and weight have the same half precision.
    """

    z: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, z: Tensor, weight: Tensor, bias: Tensor) -> Head:
        """Convert z (B, Z), weight (V, Z) and bias (V,)."""
        # A z in fp32 with a head in half precision is not rounded: its product is made exact.
        halves = z.dtype == weight.dtype and z.dtype in HALVES
        z = z.to(z.dtype if halves else torch.float32)
        return cls(z.contiguous(), weight.contiguous(), bias.contiguous())

    @property
    def sizes(self) -> tuple[int, int, int]:
        """B, V, Z."""
        vocab, width = self.weight.shape
        return self.z.shape[0], vocab, width

    @property
    def lift(self) -> float:
        """By what the errors are multiplied so that the head's dtype holds the small ones."""
        return LIFT.get(self.weight.dtype, 1.0)

    def programs(self, kernel: str, configs: Configs) -> tuple[int, LaunchConfig]:
        """Return how many programs share the vocabulary, and their configuration."""
        # Without tensor cores the products themselves fill the registers.
        suffix = "_fp32" if self.weight.dtype == torch.float32 else ""
        config = _by_rows(kernel, self.z, self.z.shape[1], suffix, configs)
        blocks = triton.cdiv(self.weight.shape[0], config["BLOCK_V"])
        # The kernel reads off its grid how many there are: no reason to compile it again.
        return min(config["PROGRAMS"], blocks), {
            name: value for name, value in config.items() if name != "PROGRAMS"
        }

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Make an uninitialised tensor beside the operands."""
        return torch.empty(shape, dtype=dtype, device=self.z.device)


def _of_no_rows(z: Tensor, weight: Tensor, want_z: bool, want_head: bool) -> Sums:
    """Return a loss of 0 and empty gradients: a grid of no programs cannot be launched."""
    zero = torch.zeros((), device=z.device)
    grad_z = torch.zeros(z.shape, device=z.device) if want_z else None
    return Sums(zero, grad_z, z.new_empty(0, weight.shape[0]) if want_head else None)


def launch_targets(head: Head, ids: Tensor, cu_seqlens: Tensor, configs: Configs) -> Tensor:
    """Set one bit per row and token that it holds; returns bits (B, words) int32.

    head: the operands; their sizes count.
    ids (T,): int64 or int32.
    cu_seqlens (B+1,): int32.
    """
    # No token sets no bit: a grid of no programs cannot be launched.
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


def launch_log_sum_exp(head: Head, configs: Configs) -> Tensor:
    """Compute each program's log-sum-exp over its share of the vocabulary, (G, B) fp32."""
    num_rows, vocab, width = head.sizes
    programs, config = head.programs("bow.log_sum_exp", configs)
    # Apart for each program: the caller puts them together in a fixed order.
    out = head.empty(programs, num_rows)
    kernels.log_sum_exp_kernel[(programs,)](
        *head, out, num_rows, vocab, width, BLOCK_Z=block_z(width), **config
    )
    return out


def launch_errors(
    head: Head,
    bits: Tensor | None,
    lse: Tensor | None,
    want_z: bool,
    want_head: bool,
    configs: Configs,
) -> Sums:
    """Compute the BCE given `bits`, or given `lse` the categorical probabilities.

    head: the operands.
    bits (B, words): int32, the targets of the BCE; else None.
    lse (B,): fp32, the log-sum-exp of the categorical loss, whose loss here is 0; else None.
    want_z: whether to compute the gradient of z.
    want_head: whether to compute the errors.
    """
    # Make room: the programs' sums apart, since they are added in a fixed order afterwards.
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
        BLOCK_Z=block_z(width),
        **config,
    )
    return Sums(loss.sum(), None if grad_z is None else grad_z.sum(dim=0), errors)


def launch_bag(
    head: Head, ids: Tensor, cu_seqlens: Tensor, configs: Configs
) -> tuple[Tensor, Tensor, Tensor]:
    """Average over each row's tokens: the weight's rows (B, Z) and the logits (B,), fp32.

    The third tensor (B,) int32 counts them: ids outside the vocabulary are none.

    head: the operands.
    ids (T,): int64 or int32.
    cu_seqlens (B+1,): int32.
    """
    num_rows, vocab, width = head.sizes
    # One program a row: a row's tokens are summed in one order.
    mean_weight, mean_logit = head.empty(num_rows, width), head.empty(num_rows)
    counts = head.empty(num_rows, dtype=torch.int32)
    config = configuration("bow.bag", ids.device, configs)
    kernels.bag_kernel[(num_rows,)](
        *head,
        ids.contiguous(),
        cu_seqlens.contiguous(),
        mean_weight,
        mean_logit,
        counts,
        vocab,
        width,
        BLOCK_Z=block_z(width),
        **config,
    )
    return mean_weight, mean_logit, counts


def launch_cells(
    head: Head,
    ids: Tensor,
    cu_seqlens: Tensor,
    lse: Tensor,
    counts: Tensor,
    errors: Tensor,
    configs: Configs,
) -> None:
    """Overwrite the categorical errors at each row's own tokens, where the targets count.

    head: the operands.
    ids (T,): int64 or int32.
    cu_seqlens (B+1,): int32.
    lse (B,): fp32.
    counts (B,): int32, as `launch_bag` gives them.
    errors (B, V): written at the tokens.
    """
    # No token changes no error: a grid of no programs cannot be launched.
    if ids.numel() == 0:
        return
    num_rows, vocab, width = head.sizes
    config = configuration("bow.cells", ids.device, configs)
    kernels.cells_kernel[(triton.cdiv(ids.numel(), config["BLOCK_T"]),)](
        *head,
        ids.contiguous(),
        cu_seqlens.contiguous(),
        lse,
        counts,
        errors,
        ids.numel(),
        num_rows,
        vocab,
        width,
        STEPS=search_steps(num_rows),
        LIFT=head.lift,
        BLOCK_Z=block_z(width),
        **config,
    )


def _by_rows(
    kernel: str,
    rows: Tensor,
    width: int,
    suffix: str,
    configs: Configs,
) -> LaunchConfig:
    """Look up the configuration for as many rows as the tensor has, narrowed for a wide z.

    kernel: "bow.<kernel>".
    rows (B, ...): on the device of the launch.
    width: Z.
    suffix: "_fp32" for the configurations without tensor cores, else empty.
    """
    name = f"{kernel}.{'few' if rows.shape[0] <= FEW_ROWS else 'many'}{suffix}"
    config = configuration(name, rows.device, configs)
    # Registers hold BLOCK_V x BLOCK_Z numbers: twice as wide a z takes half as many columns.
    wide = max(block_z(width) // USUAL_WIDTH, 1)
    return {**config, "BLOCK_V": max(config["BLOCK_V"] // wide, 16)}


def block_z(width: int) -> int:
    """Return the latent width as the kernels have it: a power of two that the tensor cores take."""
    return max(triton.next_power_of_2(width), 16)
