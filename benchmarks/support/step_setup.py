"""What the implementations of a training step share: sizes, settings, and the same weights.

`Setup` is handed to each of them. Frozen weights are shared storage, so three models in one
process hold one backbone; trainable ones are copies, because each optimizer moves its own.
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

# Llama's dimensions, and what differs from the description's settings. "tiny" is the quickstart's
# backbone with the quickstart's settings; "8b" is Llama-3.1-8B with the description's.
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
LORA_B_STD = 0.01


@dataclass
class Setup:
    """settings: of the run. llama: dimensions. tokens: special ids. device, dtype: of the base.

    base: the backbone's weights by their names in `LlamaForCausalLM`. lora: PEFT's, by their
    names in the PEFT model. heads: by module (pooling, encoder, projector, bow_head), then name.
    lora and heads are fp32 on the CPU.
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
        """A `LlamaForCausalLM` over the shared frozen weights. attention: implementation's name."""
        config = copy.deepcopy(self.llama)
        config._attn_implementation = attention
        llama = _build_llama(config, self.device, self.dtype)
        llama.load_state_dict(self.base, assign=True)
        return llama.requires_grad_(False)

    def load_trainable(self, lora_owner: nn.Module, heads: dict[str, nn.Module]) -> None:
        """Copy the shared start into a model: PEFT's module, and the heads by name."""
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
    """The settings of a run at one of SHAPES. checkpointing: None is the shape's own."""
    groups = copy.deepcopy(SHAPES[shape][1])
    training = groups.setdefault("training", {})
    training |= {
        "precision": precision,
        "per_device_batch_size": micro_batch,
        "gradient_accumulation_steps": accum,
        "max_steps": 1000,
        "seed": seed,
    }
    if checkpointing is not None:
        training["gradient_checkpointing"] = checkpointing
    return parse_settings(groups)


def llama_for(shape: str, backbone: str | None) -> LlamaConfig:
    """Dimensions: of a backbone's directory or hub id, else those of the shape."""
    return load_llama_config(backbone) if backbone else LlamaConfig(**SHAPES[shape][0])


def make_setup(
    settings: Settings,
    llama: LlamaConfig,
    backbone: str | None,
    corpus: Corpus,
    device: torch.device,
) -> Setup:
    """Weights from the seed, or the backbone's own where one is given.

    LoRA's B starts at N(0, 0.01) instead of 0: otherwise LoRA on and LoRA off are the same
    function, and the comparison of losses would not see who mixes them up.
    Raises ValueError when the data's ids do not fit the vocabulary.
    """
    if corpus.max_id >= llama.vocab_size:
        raise ValueError(
            f"the data has ids up to {corpus.max_id}, the backbone's vocabulary holds "
            f"{llama.vocab_size}; give the tokenizer that belongs to the backbone"
        )
    dtype = torch.bfloat16 if settings.training.precision == "bf16" else torch.float32
    torch.manual_seed(settings.training.seed)
    if backbone:
        base = LlamaForCausalLM.from_pretrained(backbone, dtype=dtype).to(device)
    else:
        base = _build_llama(llama, device, dtype)
    weights = {name: value.detach() for name, value in base.state_dict().items()}
    model = LlamaSoftPromptVAE(settings.model, Backbone(base, settings.model), corpus.tokens)
    lora = {n: p for n, p in model.backbone.peft.named_parameters() if "lora_" in n}
    for name, value in lora.items():
        if "lora_B" in name:
            nn.init.normal_(value, std=LORA_B_STD)
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
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def _copy(value: Tensor) -> Tensor:
    return value.detach().float().cpu().clone()
