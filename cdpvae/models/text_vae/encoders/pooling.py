"""From hidden states to q(z|x): layer mix, attention pooling, variational encoder.

Legend: B rows, T packed tokens, L longest row, D hidden, H heads, F head dimension, Z latent.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cdpvae.batch import Posterior
from cdpvae.config import ModelConfig
from cdpvae.models.text_vae.packing import Packing


class LayerMix(nn.Module):
    """A learned softmax over the hidden states of all layers (`encoder_layer: mix`).

    Starts as the plain mean. Peters et al. 2018 (ELMo), section 3.2, without the task scale.
    """

    def __init__(self, num_states: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num_states))

    def forward(self, states: list[Tensor]) -> Tensor:
        """states: one (T, D) for the embedding and one per layer -> (T, D)."""
        weights = self.logits.float().softmax(0)
        mixed = sum(weight * state.float() for weight, state in zip(weights, states, strict=True))
        return mixed.to(states[0].dtype)


class AttentionPooling(nn.Module):
    """Multi-head attention of one learned query over the tokens of each row, then LayerNorm.

    The parameters are those of `nn.MultiheadAttention`. As every row shares the query, the key
    projection folds into it and the value projection comes after the weighted mean: the same
    function with D*H instead of 2*D*D multiplications per token.
    """

    def __init__(self, hidden_dim: int, num_heads: int = 8, dropout: float = 0.1):
        super().__init__()
        if hidden_dim % num_heads:
            raise ValueError(
                f"pooling_heads={num_heads} must divide the backbone's hidden size {hidden_dim}"
            )
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = nn.Parameter(torch.randn(1, 1, hidden_dim) * hidden_dim**-0.5)
        self.attention = nn.MultiheadAttention(
            hidden_dim, num_heads, dropout=dropout, batch_first=True
        )
        self.norm = nn.LayerNorm(hidden_dim)

    def forward(self, hidden_TD: Tensor, packing: Packing) -> Tensor:
        """(T, D) packed hidden states -> (B, D). Tokens of other rows have no influence."""
        heads, dim = self.num_heads, hidden_TD.shape[-1]
        w_query, w_key, w_value = self.attention.in_proj_weight.chunk(3)
        b_query, _, b_value = self.attention.in_proj_bias.chunk(3)
        query_D = F.linear(self.query[0, 0], w_query, b_query) * (dim // heads) ** -0.5
        # The key bias adds the same number to every score of a head: the softmax forgets it.
        folded_HD = torch.einsum("hf,hfd->hd", query_D.view(heads, -1), w_key.view(heads, -1, dim))
        scores_TH = F.linear(hidden_TD, folded_HD).float()
        weights = self._softmax_per_row(scores_TH, packing).to(hidden_TD.dtype)
        mean_BHD = torch.einsum("blh,bld->bhd", weights, packing.pad(hidden_TD))
        # Dropped weights no longer sum to one, so the value bias is scaled by their sum.
        total_BH = weights.sum(1)
        value_BHF = torch.einsum("bhd,hfd->bhf", mean_BHD, w_value.view(heads, -1, dim))
        value_BHF = value_BHF + total_BH[..., None] * b_value.view(heads, -1)
        return self.norm(self.attention.out_proj(value_BHF.flatten(1)))

    def _softmax_per_row(self, scores_TH: Tensor, packing: Packing) -> Tensor:
        """-> (B, L, H) fp32 weights, zero at padding."""
        weights = packing.pad(scores_TH, fill=float("-inf")).softmax(1)
        return F.dropout(weights, self.dropout, self.training)


class VariationalEncoder(nn.Module):
    """Pooled representation -> mu and logvar of q(z|x).

    Two GELU layers with dropout. The logvar head starts at weight N(0, 0.01) (standard deviation)
    and bias -2: neither exploding nor, as with zeros, cut off from the gradient.
    """

    def __init__(
        self,
        input_dim: int,
        latent_dim: int = 64,
        hidden_dim: int = 2048,
        dropout: float = 0.1,
        logvar_init_bias: float = -2.0,
        logvar_clamp: float = 10.0,
    ):
        super().__init__()
        self.logvar_clamp = logvar_clamp
        self.mlp = nn.Sequential(
            nn.Linear(input_dim, hidden_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Dropout(dropout),
        )
        self.mu_head = nn.Linear(hidden_dim, latent_dim)
        self.logvar_head = nn.Linear(hidden_dim, latent_dim)
        nn.init.normal_(self.logvar_head.weight, mean=0.0, std=0.01)
        nn.init.constant_(self.logvar_head.bias, logvar_init_bias)

    @classmethod
    def of(cls, config: ModelConfig, input_dim: int) -> VariationalEncoder:
        return cls(
            input_dim,
            config.latent.latent_dim,
            config.vae_hidden_dim,
            config.encoder_dropout,
            config.latent.logvar_init_bias,
            config.latent.logvar_clamp,
        )

    def forward(self, pooled_BD: Tensor) -> Posterior:
        """(B, D) -> mu and logvar, each (B, Z), computed in fp32 whatever the MLP's dtype."""
        hidden = self.mlp(pooled_BD).float()
        mu = F.linear(hidden, self.mu_head.weight.float(), self.mu_head.bias.float())
        logvar = F.linear(hidden, self.logvar_head.weight.float(), self.logvar_head.bias.float())
        return Posterior(mu, logvar.clamp(-self.logvar_clamp, self.logvar_clamp))


def reparameterize(posterior: Posterior, noise_BZ: Tensor) -> Tensor:
    """z = mu + exp(logvar/2) * noise, fp32. Kingma & Welling 2014, section 2.4."""
    return posterior.mu + torch.exp(0.5 * posterior.logvar) * noise_BZ
