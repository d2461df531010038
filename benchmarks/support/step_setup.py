"""What the variants of a training step share: sizes, settings, and the same weights.

Each variant is built from the same `Setup`. Frozen weights are shared storage, so three models in
one process hold one backbone; trainable weights are copies, because each optimizer changes its own.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.support.lengths import Corpus
from cdpvae.batch import SpecialTokens
from cdpvae.config import Settings, parse_settings
from cdpvae.models.text_vae import Backbone, LlamaSoftPromptVAE
from cdpvae.models.text_vae.backbone import load_llama_config

# Llama's dimensions, and the settings that differ from the description's. "tiny" is the
# quickstart's backbone with the quickstart's settings; "8b" is Llama-3.1-8B with the description's.
SHAPES: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "tiny": (
        {
            "vocab_size": 4096,
            "hidden_size": 192,
            "intermediate_size": 528,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "max_position_embeddings": 2048,
        },
        {
            "model": {
                "num_soft_tokens": 8,
                "vae_hidden_dim": 256,
                "pooling_heads": 6,
                "lora_r": 16,
            },
            "training": {"learning_rate": 1e-3, "eta_min": 1e-4, "gradient_checkpointing": False},
        },
    ),
    "8b": (
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
        {},
    ),
}
# Standard deviation of LoRA's B at the start; `make_setup` says why it is not 0.
LORA_B_STD = 0.01
TOTAL_STEPS = 1000  # of the learning rate's schedule; a benchmark takes only the first of them


@dataclass
class Setup:
    """The settings and weights that every variant starts from.

    settings: of the run.
    llama: the backbone's dimensions.
    tokens: special ids.
    device, dtype: of the base.
    base: the backbone's weights by their names in `LlamaForCausalLM`.
    lora: LoRA's weights by their names in the PEFT model, fp32 on the CPU.
    heads: by module (pooling, encoder, projector, bow_head), then name, fp32 on the CPU.
    """

    settings: Settings
    llama: LlamaConfig
    tokens: SpecialTokens
    device: torch.device
    dtype: torch.dtype
    base: dict[str, Tensor]
    lora: dict[str, Tensor]
    heads: dict[str, dict[str, Tensor]]

    def new_llama(self, attention: str) -> LlamaForCausalLM:
        """Build a Llama over the shared frozen weights. attention: name of the implementation."""
        # A copy, since the implementation is a field of the configuration.
        config = copy.deepcopy(self.llama)
        config._attn_implementation = attention
        llama = _build_llama(config, self.device, self.dtype)
        llama.load_state_dict(self.base, assign=True)
        return llama.requires_grad_(False)

    def load_trainable(self, lora_owner: nn.Module, heads: dict[str, nn.Module]) -> None:
        """Copy the shared trainable weights into a model.

        lora_owner: the module with PEFT's parameters. heads: by their names in `heads`.
        """
        # LoRA by name: a name that differs would leave a weight at its own random start.
        own = dict(lora_owner.named_parameters())
        names = {name for name in own if "lora_" in name}
        assert names == self.lora.keys(), names ^ self.lora.keys()
        with torch.no_grad():
            for name, value in self.lora.items():
                own[name].copy_(value)
        for name, head in heads.items():
            head.load_state_dict(self.heads[name])


def settings_for(
    shape: str, micro_batch: int, accum: int, precision: str, checkpointing: bool | None, seed: int
) -> Settings:
    """Make the settings of a run.

    shape: a key of SHAPES.
    micro_batch: rows per micro-batch.
    accum: micro-batches per optimizer step.
    precision: "fp32" or "bf16".
    checkpointing: activation checkpointing; None is the shape's own choice.
    seed: of weights and draws.
    """
    # The shape's own settings, then what the command line asks for.
    groups = copy.deepcopy(SHAPES[shape][1])
    training = groups.setdefault("training", {})
    training |= {
        "precision": precision,
        "per_device_batch_size": micro_batch,
        "gradient_accumulation_steps": accum,
        "max_steps": TOTAL_STEPS,
        "seed": seed,
    }
    if checkpointing is not None:
        training["gradient_checkpointing"] = checkpointing
    return parse_settings(groups)


def llama_for(shape: str, backbone: str | None) -> LlamaConfig:
    """Read the dimensions of a backbone's directory or hub id, else take those of the shape."""
    return load_llama_config(backbone) if backbone else LlamaConfig(**SHAPES[shape][0])


def make_setup(
    settings: Settings,
    llama: LlamaConfig,
    backbone: str | None,
    corpus: Corpus,
    device: torch.device,
) -> Setup:
    """Make the weights from the seed, or load the backbone's own.

    settings: of the run; its seed decides the weights.
    llama: dimensions.
    backbone: a directory or hub id, or None for random weights.
    corpus: the data. Raises ValueError when its ids do not fit the vocabulary.
    device: of the frozen weights.

    LoRA's B starts at N(0, 0.01) instead of 0: otherwise LoRA on and LoRA off are the same
    function, and the comparison of losses would not notice a variant that confuses them.
    """
    if corpus.max_id >= llama.vocab_size:
        raise ValueError(
            f"the data has ids up to {corpus.max_id}, the backbone's vocabulary holds "
            f"{llama.vocab_size}; give the tokenizer that belongs to the backbone"
        )
    # The backbone, frozen.
    dtype = torch.bfloat16 if settings.training.precision == "bf16" else torch.float32
    torch.manual_seed(settings.training.seed)
    if backbone:
        base = LlamaForCausalLM.from_pretrained(backbone, dtype=dtype)
        nn.Module.to(base, device)  # transformers' own `to` has lost its types
    else:
        base = _build_llama(llama, device, dtype)
    weights = {name: value.detach() for name, value in base.state_dict().items()}
    # LoRA and the heads, as cdpvae's own model starts them.
    model = LlamaSoftPromptVAE(settings.model, Backbone(base, settings.model), corpus.tokens)
    lora = {n: p for n, p in model.backbone.peft.named_parameters() if "lora_" in n}
    for name, value in lora.items():
        if "lora_B" in name:
            nn.init.normal_(value, std=LORA_B_STD)
    # Copies on the CPU: each variant takes its own to its device.
    return Setup(
        settings=settings,
        llama=llama,
        tokens=corpus.tokens,
        device=device,
        dtype=dtype,
        base=weights,
        lora={name: _copy(value) for name, value in lora.items()},
        heads={
            name: {key: _copy(value) for key, value in head.state_dict().items()}
            for name, head in model.head_modules().items()
        },
    )


def _build_llama(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    # Built in its dtype from the start: an 8B in fp32 would take twice the memory.
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def _copy(value: Tensor) -> Tensor:
    return value.detach().float().cpu().clone()
