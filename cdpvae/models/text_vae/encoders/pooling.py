"""From hidden states to one vector a text: layer mix and attention pooling.

Legend: B rows, T packed tokens, L longest row, D hidden, Q queries, H heads, F head dimension.
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
    """Pool the tokens of each row by multi-head attention of learned queries, then LayerNorm.

    The parameters are those of `nn.MultiheadAttention`. As every row shares the queries, the key
    projection folds into them and the value projection comes after the weighted mean: the same
    function with D*H*Q instead of 2*D*D multiplications per token.

    hidden_dim: D.
    num_heads: H.
    dropout: of the attention weights.
    num_queries: Q; the results of the queries stand side by side.
    num_positions: N, rows of a learned table that tells where each token stands, added to the
        state at a root mean square of 1; tokens from N on share its last row. The order of words
        is lost in states that do not tell it (those of the embedding). 0 leaves the states alone.
        The rows start at random: under sinusoids neighbours are so alike that the same recipe
        learnt a third as much (docs/LOG.md).
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int = DEFAULT.pooling_heads,
        dropout: float = DEFAULT.pooling_dropout,
        num_queries: int = DEFAULT.pooling_queries,
        num_positions: int = DEFAULT.pooling_positions,
    ) -> None:
        super().__init__()
        if hidden_dim % num_heads:
            raise ValueError(
                f"pooling_heads={num_heads} must divide the backbone's hidden size {hidden_dim}"
            )
        self.num_heads = num_heads
        self.dropout = dropout
        # Its parameters are those of the stock module, which also initialises them.
        self.query = nn.Parameter(torch.randn(1, num_queries, hidden_dim) * hidden_dim**-0.5)
        self.attention = nn.MultiheadAttention(
            hidden_dim, num_heads, dropout=dropout, batch_first=True
        )
        self.norm = nn.LayerNorm(hidden_dim)
        self.positions = None
        if num_positions:
            self.positions = nn.Parameter(torch.randn(num_positions, hidden_dim))

    @property
    def output_dim(self) -> int:
        """Q*D, the width of a pooled row."""
        return self.query.shape[1] * self.query.shape[2]

    def forward(self, hidden_TD: Tensor, packing: Packing) -> Tensor:
        """Pool packed hidden states (T, D) -> (B, Q*D). Other rows' tokens have no influence."""
        heads, dim = self.num_heads, hidden_TD.shape[-1]
        if self.positions is not None:
            place_TD = self.positions[packing.column.clamp(max=len(self.positions) - 1)]
            hidden_TD = F.rms_norm(hidden_TD, (dim,)) + place_TD
        w_query, w_key, w_value = self.attention.in_proj_weight.chunk(3)
        b_query, _, b_value = self.attention.in_proj_bias.chunk(3)
        query_QD = F.linear(self.query[0], w_query, b_query) * (dim // heads) ** -0.5
        # The key bias adds the same number to every score of a head, which no softmax sees.
        folded = torch.einsum(
            "qhf,hfd->qhd", query_QD.unflatten(1, (heads, -1)), w_key.view(heads, -1, dim)
        )
        # Every head of every query has its own weights: what follows sees Q*H heads.
        scores = F.linear(hidden_TD, folded.flatten(0, 1)).float()
        weights = self._softmax_per_row(scores, packing).to(hidden_TD.dtype)
        mean = torch.einsum("blh,bld->bhd", weights, packing.pad(hidden_TD))
        # Dropped weights no longer sum to one, so the value bias is scaled by their sum.
        mean, total = mean.view(-1, heads, dim), weights.sum(1).view(-1, heads)
        value = torch.einsum("bhd,hfd->bhf", mean, w_value.view(heads, -1, dim))
        value = value + total[..., None] * b_value.view(heads, -1)
        # One vector a query, then one a row.
        pooled = self.norm(self.attention.out_proj(value.flatten(1)))
        return pooled.view(packing.num_rows, -1)

    def _softmax_per_row(self, scores_TH: Tensor, packing: Packing) -> Tensor:
        """Return fp32 weights (B, L, H), zero at padding."""
        weights = packing.pad(scores_TH, fill=float("-inf")).softmax(1)
        return F.dropout(weights, self.dropout, self.training)
