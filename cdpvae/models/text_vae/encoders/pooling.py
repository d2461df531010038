"""From hidden states to one vector a text: layer mix and attention pooling.

Legend: B rows, T packed tokens, L longest row, D hidden, H heads, F head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cdpvae.config import ModelConfig
from cdpvae.models.text_vae.packing import Packing

# The original description's API has the values of the settings as defaults.
DEFAULT = ModelConfig()


class LayerMix(nn.Module):
    """Mix the hidden states of all layers by a learned softmax (`encoder_layer: mix`).

    Starts as the plain mean. Peters et al. 2018 (ELMo), section 3.2, without the task scale.
    """

    def __init__(self, num_states: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num_states))

    def forward(self, states: list[Tensor]) -> Tensor:
        """Mix the states, one (T, D) for the embedding and one per layer -> (T, D)."""
        weights = self.logits.float().softmax(0)
        mixed = sum(weight * state.float() for weight, state in zip(weights, states, strict=True))
        return mixed.to(states[0].dtype)


class AttentionPooling(nn.Module):
    """Pool the tokens of each row by multi-head attention of one learned query, then LayerNorm.

    The parameters are those of `nn.MultiheadAttention`. As every row shares the query, the key
    projection folds into it and the value projection comes after the weighted mean: the same
    function with D*H instead of 2*D*D multiplications per token.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int = DEFAULT.pooling_heads,
        dropout: float = DEFAULT.pooling_dropout,
    ) -> None:
        super().__init__()
        if hidden_dim % num_heads:
            raise ValueError(
                f"pooling_heads={num_heads} must divide the backbone's hidden size {hidden_dim}"
            )
        self.num_heads = num_heads
        self.dropout = dropout
        # Its parameters are those of the stock module, which also initialises them.
        self.query = nn.Parameter(torch.randn(1, 1, hidden_dim) * hidden_dim**-0.5)
        self.attention = nn.MultiheadAttention(
            hidden_dim, num_heads, dropout=dropout, batch_first=True
        )
        self.norm = nn.LayerNorm(hidden_dim)

    def forward(self, hidden_TD: Tensor, packing: Packing) -> Tensor:
        """Pool packed hidden states (T, D) -> (B, D). Tokens of other rows have no influence."""
        heads, dim = self.num_heads, hidden_TD.shape[-1]
        w_query, w_key, w_value = self.attention.in_proj_weight.chunk(3)
        b_query, _, b_value = self.attention.in_proj_bias.chunk(3)
        query_D = F.linear(self.query[0, 0], w_query, b_query) * (dim // heads) ** -0.5
        # The key bias adds the same number to every score of a head, which no softmax sees.
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
        """Return fp32 weights (B, L, H), zero at padding."""
        weights = packing.pad(scores_TH, fill=float("-inf")).softmax(1)
        return F.dropout(weights, self.dropout, self.training)
