"""Give every position of the response its own share of z, beside the soft prompts.

Soft prompts alone must carry a text through attention: the decoder has to learn where in them each
word is, and learns it slowly. Here z becomes K vectors (slots), and position t of the response
reads them through row t of a learned table. What it reads enters twice:

    added to the input embedding of position t: the decoder is told what comes next
    through the frozen output head (`loss/order.py`): z learns at once which word stands where

Feeding z to the decoder at every step is Bowman et al. 2016, section 3; position-wise prediction
from a code is the non-autoregressive decoder of Gu et al. 2018.

Legend: B rows, T packed tokens, L longest row, Z latent, K slots, N rows of the table, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cdpvae.batch import PackedText
from cdpvae.models.text_vae.packing import Packing

# The addition's first size against that of the embeddings: a word stays readable beside it.
FIRST_GAIN = 2.5


class PositionalProjector(nn.Module):
    """Project z to a state of every position, to what is added there, and to a prediction.

    latent_dim: Z.
    output_dim: D.
    num_slots: K.
    length: N; positions from N on share the last row of the table.
    embedding_rms (): root mean square of the embedding's entries, the unit of the addition.
    """

    def __init__(
        self, latent_dim: int, output_dim: int, num_slots: int, length: int, embedding_rms: Tensor
    ) -> None:
        super().__init__()
        self.num_slots = num_slots
        self.slots = nn.Linear(latent_dim, num_slots * output_dim)
        # Each of the first positions starts with a slot of its own, the others share the last.
        own = torch.arange(length).clamp(max=num_slots - 1)
        self.table = nn.Parameter(nn.functional.one_hot(own, num_slots).float())
        self.mix = nn.Linear(output_dim, output_dim)
        self.norm = nn.LayerNorm(output_dim)
        # One number in a vector: DeepSpeed cannot broadcast a parameter without dimensions.
        self.gain = nn.Parameter(FIRST_GAIN * embedding_rms.detach().float().reshape(1))
        self.prediction_norm = nn.LayerNorm(output_dim)

    def forward(
        self, z_BZ: Tensor, embeds_XD: Tensor, positions_T: Tensor, response: PackedText
    ) -> tuple[Tensor, Tensor]:
        """Add to the decoder's input what each position of the response reads.

        z_BZ (B, Z): one latent a row.
        embeds_XD (X, D): the packed input, prompts and whatever else included.
        positions_T (T,) int64: where the response's tokens are in it.
        response: its rows.

        Returns the input with the additions, and hidden states (T, D) for the output head.
        """
        layout = Packing.of(response.cu_seqlens, positions_T.numel(), response.max_len)
        states_TD = self.states(z_BZ, layout)
        additions = self.additions(states_TD).to(embeds_XD.dtype)
        return embeds_XD.index_add(0, positions_T, additions), self.prediction_norm(states_TD)

    def states(self, z_BZ: Tensor, packing: Packing) -> Tensor:
        """Return what each position reads, for responses packed so -> (T, D)."""
        every = torch.arange(packing.max_len, device=z_BZ.device)
        return packing.unpad(self._read(self.slots_of(z_BZ), every))

    def slots_of(self, z_BZ: Tensor) -> Tensor:
        """Project z (B, Z) to its slots (B, K, D)."""
        return self.slots(z_BZ.to(self.table.dtype)).unflatten(-1, (self.num_slots, -1))

    def additions(self, states_XD: Tensor) -> Tensor:
        """Return what is added to the input embedding of positions in these states (..., D)."""
        return self.gain * self.norm(self.mix(states_XD))

    def additions_at(self, slots_BKD: Tensor, column_BL: Tensor) -> Tensor:
        """Return the additions of single positions, 0 at negative ones -> (B, L, D)."""
        additions = self.additions(self._read(slots_BKD, column_BL))
        return additions.masked_fill((column_BL < 0)[..., None], 0.0)

    def _read(self, slots_BKD: Tensor, positions: Tensor) -> Tensor:
        """Read the slots of every row at positions (L,), or its own (B, L) -> (B, L, D)."""
        return self.table[positions.clamp(0, len(self.table) - 1)] @ slots_BKD


def root_mean_square(weight: Tensor) -> Tensor:
    """Return the root mean square of the entries, (), in fp32 at least."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight.detach(), dtype=wide) / weight.numel() ** 0.5
