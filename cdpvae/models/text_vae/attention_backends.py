"""Choose between three ways to compute packed causal attention.

    flash_attn   the flash-attn package, FlashAttention 2: fastest where it is installed.
                 Tests hold our call to its published signature.
    varlen       torch.nn.attention.varlen: FlashAttention 2 inside torch, nothing to install.
    sdpa         pad, scaled_dot_product_attention, unpad: runs everywhere in any dtype.

All three see the same thing: a query sees the keys of its own sequence up to itself, and the whole
prefix of its sequence. Keys may therefore outnumber queries; the last query belongs to the last
key (FlashAttention's causal order since 2.1, where torch's `is_causal` aligns the first ones).

`varlen_attn` grew between torch 2.11 and 2.13, so its parameters are read off its signature once.

Legend: B rows, T packed tokens, H heads, K key/value heads, F head dimension, P prefix length.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cdpvae.models.text_vae.packing import Packing, Prefix, causal_mask

Attend = Callable[[Tensor, Tensor, Tensor, Packing, Prefix | None, float], Tensor]
"""(query (T, H, F), key (T, K, F), value (T, K, F), packing, prefix, scaling) -> (T, H, F)."""

VarlenKernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float], Tensor]
"""(q, k, v, cu_seqlens, cu_seqlens_k, max_len, max_len_k, scaling), all packed -> (T, H, F)."""

# What FlashAttention 2 computes in.
HALF = (torch.bfloat16, torch.float16)


class Unavailable(Exception):
    """A backend cannot run here; the message is the reason."""


@dataclass(frozen=True)
class AttentionBackend:
    """Name a backend that runs here, and the function that computes.

    name: a key of BACKENDS. attend: the function. note: a caveat, and why each backend before this
    one in the order does not run.
    """

    name: str
    attend: Attend
    note: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.note})" if self.note else self.name


def choose_backend(
    wanted: str, device: torch.device, dtype: torch.dtype, head_dim: int
) -> AttentionBackend:
    """Choose the backend for tensors of a device, dtype and head dimension.

    wanted: a name of BACKENDS, or 'auto', which takes the first that runs.
    device, dtype: of the queries, keys and values.
    head_dim: F.

    Raises ValueError, one line, when the backend asked for does not run.
    """
    # Try one after the other; the reasons of those before are kept for the user.
    refused = []
    for name in BACKENDS if wanted == "auto" else (wanted,):
        try:
            attend = BACKENDS[name](device, dtype, head_dim)
        except Unavailable as reason:
            refused.append(str(reason))
            continue
        caveat = ["untested on hardware"] if name in UNTESTED_ON_HARDWARE else []
        return AttentionBackend(name, attend, "; ".join(caveat + refused))
    raise ValueError(
        f"model.attention={wanted!r} cannot run here: {refused[0]}; set it to 'auto' or 'sdpa'"
    )


# The choice. Each function gives its backend's `Attend` or raises Unavailable.


def _flash_attn(device: torch.device, dtype: torch.dtype, head_dim: int) -> Attend:
    if importlib.util.find_spec("flash_attn") is None:
        raise Unavailable("flash-attn is not installed")
    _check_limits("flash-attn", device, dtype, head_dim)
    try:
        # A wheel built for another torch fails here; so does a package with FlashAttention 4 only.
        from flash_attn.flash_attn_interface import flash_attn_varlen_func
    except ImportError as error:
        reason = str(error).strip().partition("\n")[0]
        raise Unavailable(f"flash-attn does not import: {reason}") from None
    return packed_attend(flash_attn_kernel(flash_attn_varlen_func))


def _varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> Attend:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        raise Unavailable("varlen is not in this torch")
    _check_limits("varlen", device, dtype, head_dim)
    if not torch.backends.cuda.is_flash_attention_available():
        raise Unavailable("varlen needs a torch that is built with FlashAttention")
    from torch.nn.attention.varlen import varlen_attn

    return packed_attend(varlen_kernel(varlen_attn))


def _sdpa(device: torch.device, dtype: torch.dtype, head_dim: int) -> Attend:
    return attend_padded


# Best first.
BACKENDS: dict[str, Callable[[torch.device, torch.dtype, int], Attend]] = {
    "flash_attn": _flash_attn,
    "varlen": _varlen,
    "sdpa": _sdpa,
}

# Their signatures are tested, their kernels have not run yet. `test_on_a_gpu` in
# tests/models/text_vae/test_attention.py runs them where there is one: take out what it has passed.
UNTESTED_ON_HARDWARE = ("flash_attn", "varlen")


def _check_limits(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Raise Unavailable for inputs that FlashAttention 2 does not take."""
    if device.type != "cuda":
        raise Unavailable(f"{name} needs CUDA")
    if dtype not in HALF:
        raise Unavailable(f"{name} needs bf16 or fp16, not {str(dtype).removeprefix('torch.')}")
    if head_dim > 256 or head_dim % 8:
        raise Unavailable(
            f"{name} needs a head dimension that 8 divides, at most 256, not {head_dim}"
        )
    # FlashAttention 2 has no kernel for GPUs before Ampere.
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise Unavailable(f"{name} needs compute capability 8.0 (Ampere), not {major}.{minor}")


# Packed: flash_attn and varlen


def packed_attend(kernel: VarlenKernel) -> Attend:
    """Wrap a kernel that reads `cu_seqlens`: the prefix is put before every sequence."""

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        packing: Packing,
        prefix: Prefix | None,
        scaling: float,
    ) -> Tensor:
        # These kernels take more keys than queries, so the prefix becomes keys and values.
        if prefix is not None:
            key = packing.join_prefix(prefix[0], key)
            value = packing.join_prefix(prefix[1], value)
        return kernel(
            query,
            key,
            value,
            packing.cu_seqlens,
            packing.cu_seqlens_k,
            packing.max_len,
            packing.max_len_k,
            scaling,
        )

    return attend


def flash_attn_kernel(function: Callable[..., Tensor]) -> VarlenKernel:
    """Call `flash_attn_varlen_func` of flash-attn 2. Raises Unavailable when it is too old."""
    # Causal order is aligned at the last key since 2.1; these have all been there since 2.4.1.
    missing = {"softmax_scale", "causal", "window_size", "deterministic"} - _parameters(function)
    if missing:
        raise Unavailable(
            f"flash-attn is too old: flash_attn_varlen_func has no {', '.join(sorted(missing))}"
        )

    def kernel(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        cu_seqlens_k: Tensor,
        max_len: int,
        max_len_k: int,
        scaling: float,
    ) -> Tensor:
        return function(
            q,
            k,
            v,
            cu_seqlens,
            cu_seqlens_k,
            max_len,
            max_len_k,
            dropout_p=0.0,
            softmax_scale=scaling,
            causal=True,
            # As torch's own operators do. By default its backward adds in any order.
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )

    return kernel


def varlen_kernel(function: Callable[..., Tensor | tuple[Tensor, Tensor]]) -> VarlenKernel:
    """Call `varlen_attn` of torch with the parameters that it has.

    torch 2.10 has `is_causal`; 2.11 `scale` and `window_size` in its place; 2.12 `enable_gqa`.
    Raises Unavailable when causal order can be asked for in neither way.
    """
    # Find out how this torch is asked for causal order, for a scale and for grouped heads.
    parameters = _parameters(function)
    options: dict[str, object]
    if "window_size" in parameters:
        options = {"window_size": (-1, 0)}
    elif "is_causal" in parameters:
        options = {"is_causal": True}
    else:
        raise Unavailable("varlen has neither window_size nor is_causal in this torch")
    takes_scale, takes_groups = "scale" in parameters, "enable_gqa" in parameters

    def kernel(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        cu_seqlens_k: Tensor,
        max_len: int,
        max_len_k: int,
        scaling: float,
    ) -> Tensor:
        # Do beforehand what this torch's kernel cannot do itself.
        extra: dict[str, object] = {}
        groups = q.shape[1] // k.shape[1]
        if takes_scale:
            extra["scale"] = scaling
        else:
            # Its own scale is F**-0.5, so the factor that remains is 1 in a Llama.
            q = q * (scaling * q.shape[-1] ** 0.5)
        if takes_groups:
            extra["enable_gqa"] = groups > 1
        elif groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = function(q, k, v, cu_seqlens, cu_seqlens_k, max_len, max_len_k, **options, **extra)
        assert isinstance(out, Tensor), "only `return_aux` makes it return more"
        return out

    return kernel


def _parameters(function: Callable[..., object]) -> set[str]:
    return set(inspect.signature(function).parameters)


# Padded: sdpa


def attend_padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    prefix: Prefix | None,
    scaling: float,
) -> Tensor:
    """Attend by padding to the longest row; an `Attend`.

    Padding is on the right, where causal order hides it from every token that is kept.

    query (T, H, F): packed, as key and value (T, K, F).
    packing: where every packed token belongs.
    prefix: keys and values (B, K, P, F) that every query of their sequence sees, or None.
    scaling: what scores are multiplied by before the softmax.

    -> (T, H, F)
    """
    # Pad, put the prefix before the keys, attend, and drop the padding.
    q, k, v = (packing.pad(x).transpose(1, 2) for x in (query, key, value))
    if prefix is not None:
        k = torch.cat((prefix[0].to(k.dtype), k), dim=2)
        v = torch.cat((prefix[1].to(v.dtype), v), dim=2)
    out = _sdpa_call(q, k, v, scaling, packing.mask)
    return packing.unpad(out.transpose(1, 2))


def attend_batch(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Attend from the last T of S tokens: the last query is aligned with the last key.

    Generation calls this: a cache stands before the new tokens.

    query (B, H, T, F), key and value (B, K, S, F): S >= T.
    scaling: what scores are multiplied by before the softmax.

    -> (B, H, T, F)
    """
    queries, keys = query.shape[2], key.shape[2]
    # One query sees all keys, and as many queries as keys are plain causal order: no mask then.
    mask = causal_mask(queries, keys, query.device) if 1 < queries < keys else None
    return _sdpa_call(query, key, value, scaling, mask)


def _sdpa_call(q: Tensor, k: Tensor, v: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
    """Call SDPA, causal where there is no mask, with grouped heads where there are fewer keys."""
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None and q.shape[2] == k.shape[2],
        scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )
