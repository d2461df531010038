"""The network: everything but the dimensions of the Llama, which its own config.json has."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from cdpvae.config.base import Group, Strings
from cdpvae.config.latents import GaussianConfig, LatentConfig

# What stands before the response in the decoder's input.
DecoderReads = Literal["nothing", "instruction"]
# Settings of the MLPs, without effect where there are none.
MLP_SETTINGS = ("vae_hidden_dim", "encoder_dropout", "projector_dropout")


class ModelConfig(Group):
    """The network. Dimensions of the Llama itself come from its own config.json."""

    group: ClassVar[str | None] = "model"

    # The language model that encodes and decodes.
    backbone: str = Field(
        default="meta-llama/Llama-3.1-8B",
        min_length=1,
        description="Llama causal LM: hub id or directory",
    )
    tokenizer: str | None = Field(
        default=None, description="tokenizer, when the backbone brings none"
    )
    # From a text to the latent.
    encoder: Literal["frozen", "lora"] = Field(
        default="frozen",
        description="what the encoder pass runs: the frozen base (no gradient), or the base with a "
        "LoRA of its own that is trained through z",
    )
    encoder_layer: int | Literal["last", "mix"] = Field(
        default="last",
        description="hidden states the pooling reads: last, the output of layer N (the encoder "
        "pass stops there; 0 is the embedding), or mix, a learned softmax over all layers",
    )
    latent: LatentConfig = Field(
        default_factory=GaussianConfig,
        description="family of the latent z; none is the baseline: the same decoder and trainer "
        "without z (LoRA language model)",
    )
    pooling_heads: int = Field(default=8, ge=1, description="heads of the attention pooling")
    pooling_dropout: float = Field(
        default=0.1, ge=0, lt=1, description="dropout of the pooling's attention weights"
    )
    pooling_queries: int = Field(
        default=1, ge=1, description="learned queries of the pooling; results stand side by side"
    )
    pooling_positions: int = Field(
        default=0,
        ge=0,
        description="rows of a learned table that tells the pooling where each token stands; later "
        "tokens share the last, 0 is off",
    )
    projections: Literal["mlp", "linear"] = Field(
        default="mlp",
        description="what maps pooled texts to the posterior and z to the soft prompts: MLPs, or "
        "one linear layer each, which learns faster and is smaller",
    )
    vae_hidden_dim: int = Field(
        default=2048, ge=1, description="width of encoder and projector MLPs"
    )
    encoder_dropout: float = Field(
        default=0.1, ge=0, lt=1, description="dropout of the encoder's MLP"
    )
    # From z to the decoder's input.
    num_soft_tokens: int = Field(
        default=32, ge=1, description="P, soft prompts before the response"
    )
    projector_dropout: float = Field(
        default=0.1, ge=0, lt=1, description="dropout of the MLP from z to the soft prompts"
    )
    deep_prefix: bool = Field(
        default=False, description="also inject z into every layer's keys and values"
    )
    prefix_hidden_dim: int = Field(
        default=2048, ge=1, description="shared width of the deep prefix"
    )
    prefix_bottleneck_dim: int = Field(
        default=256, ge=1, description="per-layer width of the deep prefix"
    )
    prefix_scale_init: float = Field(
        default=0.1, description="initial per-layer scale of the deep prefix"
    )
    positional_slots: int = Field(
        default=0,
        ge=0,
        description="vectors made of z that every position of the response reads through a learned "
        "table and adds to its input; 0 is off",
    )
    positional_length: int = Field(
        default=1024, ge=1, description="rows of that table; later positions share the last"
    )
    # What the decoder reads beside z.
    decoder_reads: DecoderReads = Field(
        default="nothing",
        description="text before the response in the decoder's input; instruction with "
        "latent=none is the baseline of what z could hold at most",
    )
    # LoRA (Hu et al. 2021) of the decoder pass.
    lora_r: int = Field(default=64, ge=1, description="rank of the LoRA matrices")
    lora_alpha: int = Field(
        default=128, ge=1, description="LoRA's alpha, which scales BA (see use_rslora)"
    )
    lora_dropout: float = Field(
        default=0.05, ge=0, lt=1, description="dropout of the input of LoRA's A"
    )
    use_rslora: bool = Field(default=True, description="scale alpha/sqrt(r) instead of alpha/r")
    lora_target_modules: Strings = Field(
        default=(
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ),
        description="projections of every layer that have LoRA",
    )
    # What computes the heavy operations; it belongs to the machine, not to the model.
    attention: Literal["auto", "flash_attn", "varlen", "sdpa"] = Field(
        default="auto",
        description="packed attention: the flash-attn package, FlashAttention inside torch, or "
        "padded scaled_dot_product_attention; auto takes the first that runs",
    )
    kernels: Literal["auto", "triton", "reference"] = Field(
        default="auto",
        description="the heavy operations: Triton kernels (auto on a GPU) or plain PyTorch",
    )

    @property
    def latent_dim(self) -> int:
        """Z, under the name that the original description has for it.

        Raises ValueError for a family without it.
        """
        if not isinstance(self.latent, GaussianConfig):
            raise ValueError(
                f"latent_dim: a model with latent.kind={self.latent.kind} has no z like that"
            )
        return self.latent.latent_dim

    @property
    def mlp_hidden_dim(self) -> int | None:
        """Width of the MLPs before and behind z; None where `projections` has one matrix each."""
        return self.vae_hidden_dim if self.projections == "mlp" else None

    @property
    def reads_instruction(self) -> bool:
        """Whether the decoder reads the instruction before the response."""
        return self.decoder_reads == "instruction"

    @property
    def instruction_passes(self) -> int:
        """How often the backbone reads a row's instruction, as far as budgets count it."""
        # Without a latent no encoder reads it; budgets have counted it once nevertheless.
        return max(1, (self.latent.kind != "none") + self.reads_instruction)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of what such a model trains: its head modules, and LoRA."""
        if self.latent.kind == "none":
            return ("lora",)
        present = {
            "layer_mix": self.encoder_layer == "mix",
            "deep_prefix": self.deep_prefix,
            "positional": self.positional_slots > 0,
            "encoder_lora": self.encoder == "lora",
        }
        optional = (name for name, is_there in present.items() if is_there)
        return ("pooling", "latent", "projector", "bow_head", "lora", *optional)

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
        if self.latent.kind == "none" and self.encoder != "frozen":
            raise ValueError(
                f"encoder={self.encoder!r} has no effect with latent.kind=none; drop one"
            )
        if isinstance(self.encoder_layer, int) and self.encoder_layer < 0:
            raise ValueError(
                f"encoder_layer={self.encoder_layer} must be 'last', 'mix' or a layer number >= 0"
            )
        if not self.lora_target_modules:
            raise ValueError("lora_target_modules=[] must name at least one projection")
        # What belongs to the MLPs alone.
        if self.projections == "linear":
            self.refuse_idle(MLP_SETTINGS, "projections='linear'")
        # The noise of dropout has a variance too: measured, it held the rate in training alone.
        mlp_dropout = self.encoder_dropout if self.projections == "mlp" else 0.0
        dropout = max(mlp_dropout, self.pooling_dropout)
        if getattr(self.latent, "posterior", None) == "batch_norm" and dropout:
            raise ValueError(
                f"posterior='batch_norm' with encoder_dropout={self.encoder_dropout} and "
                f"pooling_dropout={self.pooling_dropout}: their noise would be normalised to the "
                "rate, whatever the texts; set both to 0"
            )
        return self
