"""The network: everything beside the dimensions of the Llama, which its own config.json has."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from cdpvae.config.base import Group, Strings
from cdpvae.config.latents import GaussianConfig, LatentConfig


class ModelConfig(Group):
    """The network. Dimensions of the Llama itself come from its own config.json."""

    group: ClassVar[str | None] = "model"

    backbone: str = Field(
        "meta-llama/Llama-3.1-8B", min_length=1, description="Llama causal LM: hub id or directory"
    )
    tokenizer: str | None = Field(None, description="tokenizer, when the backbone brings none")
    encoder_layer: int | Literal["last", "mix"] = Field(
        "last",
        description="hidden states the pooling reads: last, the output of layer N (the encoder "
        "pass stops there; 0 is the embedding), or mix, a learned softmax over all layers",
    )
    latent: LatentConfig = Field(
        default_factory=GaussianConfig,
        description="family of the latent z; none is the baseline without it",
    )
    pooling_heads: int = Field(8, ge=1, description="heads of the attention pooling")
    pooling_dropout: float = Field(0.1, ge=0, lt=1)
    vae_hidden_dim: int = Field(2048, ge=1, description="width of encoder and projector MLPs")
    encoder_dropout: float = Field(0.1, ge=0, lt=1)
    num_soft_tokens: int = Field(32, ge=1, description="P, soft prompts before the response")
    projector_dropout: float = Field(0.1, ge=0, lt=1)
    deep_prefix: bool = Field(False, description="also inject z into every layer's keys and values")
    prefix_hidden_dim: int = Field(2048, ge=1, description="shared width of the deep prefix")
    prefix_bottleneck_dim: int = Field(256, ge=1, description="per-layer width of the deep prefix")
    prefix_scale_init: float = Field(0.1, description="initial per-layer scale of the deep prefix")
    lora_r: int = Field(64, ge=1)
    lora_alpha: int = Field(128, ge=1)
    lora_dropout: float = Field(0.05, ge=0, lt=1)
    use_rslora: bool = Field(True, description="scale alpha/sqrt(r) instead of alpha/r")
    lora_target_modules: Strings = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    attention: Literal["auto", "flash_attn", "varlen", "sdpa"] = Field(
        "auto",
        description="packed attention: the flash-attn package, FlashAttention inside torch, or "
        "padded scaled_dot_product_attention; auto takes the first that runs",
    )
    kernels: Literal["auto", "triton", "reference"] = Field(
        "auto",
        description="the heavy operations: Triton kernels (auto on a GPU) or plain PyTorch",
    )

    @property
    def kernel_impl(self) -> str | None:
        """`kernels` as `cdpvae_kernels` takes it: None picks by device."""
        return None if self.kernels == "auto" else self.kernels

    @property
    def lora_scaling(self) -> float:
        """The factor PEFT applies to BA: alpha/sqrt(r) under rsLoRA, alpha/r otherwise."""
        return self.lora_alpha / (self.lora_r**0.5 if self.use_rslora else self.lora_r)

    @model_validator(mode="after")
    def _combinations(self) -> ModelConfig:
        if self.latent.kind == "none" and self.deep_prefix:
            raise ValueError("deep_prefix=true has no effect with latent.kind=none; drop one")
        if isinstance(self.encoder_layer, int) and self.encoder_layer < 0:
            raise ValueError(
                f"encoder_layer={self.encoder_layer} must be 'last', 'mix' or a layer number >= 0"
            )
        if not self.lora_target_modules:
            raise ValueError("lora_target_modules=[] must name at least one projection")
        return self
