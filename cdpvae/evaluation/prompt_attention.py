"""How much of its attention the decoder spends on what z was made into.

Fused attention gives no weights, so they are computed beside it, for one row at a time.

Legend: N rows, A layers, T tokens of a row, S keys it sees, H heads, K key/value heads, F head
dimension, P positions that carry z.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cdpvae.evaluation.encoded import EncodedRows
from cdpvae.models.text_vae.attention_backends import Attend, AttentionBackend
from cdpvae.models.text_vae.packing import Packing, Prefix, causal_mask


@dataclass
class AttentionProbe:
    """Attend as `attend` does, and keep the share of every row's attention that goes to z.

    attend: what computes.
    num_prompts: soft prompts before each row's text.
    given: tokens of each row between its prompts and its response.
    layers: a tensor (B,) for each call, that is for each layer, in their order.
    """

    attend: Attend
    num_prompts: int
    given: list[int]
    layers: list[Tensor] = field(default_factory=list)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        packing: Packing,
        prefix: Prefix | None,
        scaling: float,
    ) -> Tensor:
        """Attend; an `Attend`."""
        # A row at a time: the weights of all rows would not fit beside each other.
        borders, shares = packing.cu_seqlens.tolist(), []
        for row, (start, stop) in enumerate(zip(borders[:-1], borders[1:], strict=True)):
            keys = key[start:stop]
            if prefix is not None:
                keys = torch.cat((prefix[0][row].transpose(0, 1).to(keys.dtype), keys))
            # The prefix stands first, then the prompts: both were made of z.
            carriers = self.num_prompts + packing.prefix_len
            weights = attention_weights(query[start:stop], keys, scaling)
            # Only the response predicts, and its last token predicts nothing.
            first = self.num_prompts + self.given[row]
            shares.append(weights[:, first:-1, :carriers].sum(-1).mean())
        self.layers.append(torch.stack(shares).double().cpu())
        return self.attend(query, key, value, packing, prefix, scaling)


def attention_weights(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Return causal attention weights of one row -> (H, T, S) fp32 or fp64.

    query (T, H, F): of the row's positions. key (S, K, F): the last belongs to the last query.
    scaling: what scores are multiplied by before the softmax.
    """
    # In fp32 at least: shares of many positions add up.
    queries = query.to(torch.promote_types(query.dtype, torch.float32)).transpose(0, 1)
    keys = key.to(queries.dtype).repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = scaling * (queries @ keys.permute(1, 2, 0))
    # A query sees itself and what stands before it.
    visible = causal_mask(query.shape[0], key.shape[0], query.device)
    return scores.masked_fill(~visible, -torch.inf).softmax(-1)


@torch.no_grad()
def prompt_shares(encoded: EncodedRows) -> tuple[Tensor, Tensor]:
    """Return the attention to the positions that carry z, by row and layer.

    -> (N, A) fp64, means over heads and predicting positions; and (N,) what the share would be if
    every visible position got the same. The keys of a deep prefix carry z as well.
    """
    model, parts = encoded.model, []
    # Decode as usual, with a backend that also looks.
    backend = model.backbone.attention
    reads = model.config.reads_instruction
    given = [len(ids) if reads else 0 for ids in encoded.instructions]
    step = encoded.rows_per_batch
    with model.evaluating():
        for start in range(0, encoded.num_rows, step):
            here = given[start : start + step]
            probe = AttentionProbe(backend.attend, model.num_prompts, here)
            response, instruction = encoded.texts(start)
            z = encoded.z[start : start + step].to(model.device)
            with model.backbone.attending_with(AttentionBackend("probe", probe)):
                model.decode(z, response.ids, response, instruction)
            parts.append(torch.stack(probe.layers, 1))
    # What even attention would give: P of P + 1, P + 2, ... visible positions, more by what is
    # given.
    carriers = model.num_prompts * (1 if model.deep_prefix is None else 2)
    even = [
        (carriers / (carriers + torch.arange(1, len(ids)) + before).double()).mean()
        for ids, before in zip(encoded.responses, given, strict=True)
    ]
    return torch.cat(parts), torch.stack(even)
