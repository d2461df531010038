"""Bring z to the decoder: soft prompts before the response, and an optional deep prefix.

Legend: B rows, Z latent, D hidden, P prompts, K key/value heads, F head dimension, N layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cdpvae.config import ModelConfig
from cdpvae.models.text_vae.packing import Prefix

# The original description's API has the values of the settings as defaults.
DEFAULT = ModelConfig()


class SoftPromptProjector(nn.Module):
    """Project z to P embeddings: MLP or matrix, position embedding N(0, 0.02), LayerNorm.

    Soft prompts: Lester et al. 2021.

    latent_dim: Z.
    hidden_dim: width of the MLP's first layer; None is one linear layer instead of the MLP.
    output_dim: D.
    num_soft_tokens: P.
    dropout: rate after both inner layers of the MLP.
    """

    def __init__(
        self,
        latent_dim: int,
        hidden_dim: int | None,
        output_dim: int,
        num_soft_tokens: int = DEFAULT.num_soft_tokens,
        dropout: float = DEFAULT.projector_dropout,
    ) -> None:
        super().__init__()
        self.num_soft_tokens = num_soft_tokens
        if hidden_dim is None:
            self.mlp = nn.Sequential(nn.Linear(latent_dim, num_soft_tokens * output_dim))
        else:
            self.mlp = nn.Sequential(
                nn.Linear(latent_dim, hidden_dim),
                nn.GELU(),
                nn.Dropout(dropout),
                nn.Linear(hidden_dim, output_dim),
                nn.GELU(),
                nn.Dropout(dropout),
                nn.Linear(output_dim, num_soft_tokens * output_dim),
            )
        self.position = nn.Parameter(torch.randn(1, num_soft_tokens, output_dim) * 0.02)
        self.norm = nn.LayerNorm(output_dim)

    def forward(self, z_BZ: Tensor) -> Tensor:
        """Project z, (B, Z) fp32 -> (B, P, D) in the module's dtype."""
        prompts = self.mlp(z_BZ.to(self.position.dtype))
        prompts_BPD = prompts.view(z_BZ.shape[0], self.num_soft_tokens, -1)
        return self.norm(prompts_BPD + self.position)


class DeepPrefixProjector(nn.Module):
    """Project z to the keys and values of P prefix positions in every layer.

    One shared MLP gives a bottleneck per position; LayerNorm; every layer projects it to its own
    keys and values and scales both by one learned number. Keys carry no rotary embedding.
    Prefix tuning: Li & Liang 2021; P-tuning v2: Liu et al. 2022.

    latent_dim: Z.
    num_layers: N.
    num_kv_heads: K.
    head_dim: F.
    prefix_len: P.
    hidden_dim: width of the MLP.
    bottleneck_dim: width of the bottleneck of a position.
    scale_init: first value of every layer's scale.
    """

    def __init__(
        self,
        latent_dim: int,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        prefix_len: int = DEFAULT.num_soft_tokens,
        hidden_dim: int = DEFAULT.prefix_hidden_dim,
        bottleneck_dim: int = DEFAULT.prefix_bottleneck_dim,
        scale_init: float = DEFAULT.prefix_scale_init,
    ) -> None:
        super().__init__()
        # Shared by all layers: z to a bottleneck for each position.
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self.prefix_len, self.bottleneck_dim = prefix_len, bottleneck_dim
        self.shared = nn.Sequential(
            nn.Linear(latent_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, prefix_len * bottleneck_dim),
        )
        self.norm = nn.LayerNorm(bottleneck_dim)
        # For each layer: the bottleneck to keys and values.
        width = num_kv_heads * head_dim
        self.key = nn.ModuleList(nn.Linear(bottleneck_dim, width) for _ in range(num_layers))
        self.value = nn.ModuleList(nn.Linear(bottleneck_dim, width) for _ in range(num_layers))
        self.scale = nn.Parameter(torch.full((num_layers,), scale_init))

    def forward(self, z_BZ: Tensor) -> list[Prefix]:
        """Project z, (B, Z) -> for each layer keys and values, (B, K, P, F) each."""
        shared = self.shared(z_BZ.to(self.scale.dtype))
        bottleneck = self.norm(shared.view(z_BZ.shape[0], self.prefix_len, self.bottleneck_dim))
        layers = zip(self.key, self.value, self.scale, strict=True)
        return [
            (self._heads(key(bottleneck) * scale), self._heads(value(bottleneck) * scale))
            for key, value, scale in layers
        ]

    def _heads(self, x_BPX: Tensor) -> Tensor:
        """Split the width into heads, (B, P, K*F) -> (B, K, P, F)."""
        return x_BPX.unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
