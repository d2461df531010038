"""Measure tokens per second, model FLOP/s utilisation and peak memory.

DeepSpeed's profiler assumes that backward costs twice forward, which is wrong for a frozen base:
its weights get no gradient. The count here is our own, in FLOPs per token with n = parameters of
the matrices a token passes:

    encoder    2 n                     forward only, the layers that run
    decoder    2 n forward, 2 n for the gradient of the inputs, 2 n more where layers are recomputed
    head       2 D V forward, 2 D V for the gradient, per target token (no recomputation)

Recomputation counts as work, so with activation checkpointing this is what the literature calls
hardware utilisation. LoRA, the heads of the VAE and the quadratic part of attention are left out
(at 8B and 1,024 tokens about 2 % each), so the work done is slightly more than shown.
"""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from typing import Protocol

import torch

# Dense bf16 with fp32 accumulation, datasheet values, FLOP/s. A longer name comes before a shorter
# one that it contains. An unknown device has no entry: its utilisation shows as 0, not as a guess.
PEAK_FLOPS = (
    ("L40S", 362e12),
    ("RTX 4090", 165e12),
    ("RTX 6000 Ada", 364e12),
    ("A100", 312e12),
    ("A10G", 70e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("B200", 2250e12),
)


def peak_flops(device_name: str) -> float | None:
    """Look up the dense bf16 FLOP/s of a GPU by its CUDA device name; None when unknown.

    Only whole words count (an A1000 is no A100). A slice of a GPU and a smaller chip that shares
    its name are unknown.
    """
    # Compare whole words: blanks stand on both sides of each name.
    words = f" {device_name.replace('-', ' ')} "
    if any(f" {other} " in words for other in ("MIG", "Laptop", "D", "Ti", "Max")):
        return None
    return next((peak for name, peak in PEAK_FLOPS if f" {name} " in words), None)


class LlamaShape(Protocol):
    """The sizes that FLOPs are counted from, as `transformers.LlamaConfig` has them."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int | None
    head_dim: int | None
    num_hidden_layers: int
    vocab_size: int


def training_flops(
    llama: LlamaShape,
    *,
    encoder_tokens: int,
    decoder_tokens: int,
    target_tokens: int,
    encoder_layers: int,
    recompute: bool,
    trains_encoder: bool = False,
) -> float:
    """Count the FLOPs of one optimizer step over all ranks.

    llama: the backbone's config.
    encoder_tokens: tokens the encoder pass reads.
    decoder_tokens: tokens the decoder pass reads, soft prompts included.
    target_tokens: tokens whose logits are computed.
    encoder_layers: layers the encoder pass runs.
    recompute: whether activation checkpointing runs the decoder's layers once more.
    trains_encoder: whether the encoder pass has a backward like the decoder's.
    """
    # Count the parameters of a layer's matrices: attention, then MLP.
    hidden, width = llama.hidden_size, llama.intermediate_size
    head_dim = llama.head_dim or hidden // llama.num_attention_heads
    queries = llama.num_attention_heads * head_dim
    keys = (llama.num_key_value_heads or llama.num_attention_heads) * head_dim
    per_layer = hidden * (2 * queries + 2 * keys) + 3 * hidden * width
    # Two FLOPs a parameter and token, in every pass.
    passes = 3 if recompute else 2
    encoder_passes = passes if trains_encoder else 1
    encoder = 2 * encoder_passes * per_layer * encoder_layers * encoder_tokens
    decoder = 2 * passes * per_layer * llama.num_hidden_layers * decoder_tokens
    # Forward and the gradient of the inputs; the head's logits are not recomputed.
    head = 4 * hidden * llama.vocab_size * target_tokens
    return float(encoder + decoder + head)


def mfu(flops: float, seconds: float, peak: float | None, world_size: int) -> float:
    """Compute the model FLOP/s utilisation of all devices, 0 to 1; 0 when the peak is unknown.

    flops: work of all ranks.
    seconds: wall time it took.
    peak: FLOP/s of one device.
    world_size: devices.
    """
    if not peak or seconds <= 0:
        return 0.0
    return flops / seconds / (peak * world_size)


def peak_memory_bytes(device: torch.device) -> int:
    """Read the most bytes ever held: by the CUDA allocator, elsewhere by the resident process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # macOS counts bytes, Linux KiB.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True)
class Speed:
    """Hold the speed since the last report.

    tokens_per_second: of all ranks, without padding. mfu: 0 to 1. peak_memory_bytes: of this rank,
    since the process started.
    """

    tokens_per_second: float
    mfu: float
    peak_memory_bytes: int


class ThroughputMeter:
    """Add up work and report it over the wall time it took.

    world_size: ranks. peak: FLOP/s of one device, None when unknown. device: whose memory counts.
    """

    def __init__(self, *, world_size: int, peak: float | None, device: torch.device) -> None:
        self.world_size, self.peak, self.device = world_size, peak, device
        self.restart()

    def restart(self) -> None:
        """Forget what was counted; time spent before now does not count."""
        self.tokens, self.flops = 0, 0.0
        self.start = time.perf_counter()

    def add(self, tokens: int, flops: float) -> None:
        """Add the work of one step, over all ranks."""
        self.tokens += tokens
        self.flops += flops

    def report(self) -> Speed:
        """Compute the speed since the last report or restart, and start anew."""
        # Two reports in a row must not divide by zero.
        seconds = max(time.perf_counter() - self.start, 1e-9)
        speed = Speed(
            self.tokens / seconds,
            mfu(self.flops, seconds, self.peak, self.world_size),
            peak_memory_bytes(self.device),
        )
        self.restart()
        return speed
