"""From latents to text.

Generation starts from the soft prompts (and the deep prefix) of z plus `[BOS]`, keeps a key/value
cache, and stops at EOS. All rows of a batch have the same length at every step, so nothing is
padded. Where the decoder reads instructions first, they may differ in length: a row that has more
to read is given its next token while others write theirs.

Legend: B rows, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import Cache

from cdpvae.batch import PackedText, SpecialTokens
from cdpvae.models.text_vae.backbone import Backbone


class Writer(Protocol):
    """What generation needs of a model."""

    backbone: Backbone
    tokens: SpecialTokens

    def fill_prefix_cache(self, z: Tensor, cache: Cache) -> int:
        """Put the deep prefix of z into an empty cache -> the position of the next token."""
        ...

    def soft_prompts(self, z: Tensor) -> Tensor:
        """Return the soft prompts of z -> (B, P, D)."""
        ...

    def slots_of(self, z: Tensor) -> Tensor | None:
        """Return what positions of the response read of z; None where they read nothing."""
        ...

    def embed_at(self, ids: Tensor, slots: Tensor | None, column: Tensor) -> Tensor:
        """Return the decoder's input (B, L, D) for tokens (B, L) at these response positions."""
        ...


def choose_token(
    logits_BV: Tensor, temperature: float, top_p: float, generator: torch.Generator | None = None
) -> Tensor:
    """Choose the next token of every row -> (B,) int64.

    logits_BV (B, V): of the last position.
    temperature: divides the logits; 0 is greedy.
    top_p: keeps the smallest set of tokens whose probability reaches it (nucleus sampling,
        Holtzman et al. 2020).
    generator: of the draw, on any device.

    Raises ValueError outside temperature >= 0 and 0 < top_p <= 1.
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature={temperature} must be >= 0 (0 is greedy) and top_p={top_p} in (0, 1]"
        )
    if temperature == 0:
        return logits_BV.argmax(-1)
    probabilities = (logits_BV.float() / temperature).softmax(-1)
    sorted_p, order = probabilities.sort(dim=-1, descending=True)
    # A token stays while the mass before it is below top_p, so the most likely one always stays.
    before = sorted_p.cumsum(-1) - sorted_p
    sorted_p = sorted_p.masked_fill(before >= top_p, 0.0)
    # A generator draws where it lives, which need not be where the model is.
    place = sorted_p.device if generator is None else generator.device
    chosen = torch.multinomial(sorted_p.to(place), 1, generator=generator)
    return order.gather(1, chosen.to(order.device)).squeeze(1)


@torch.no_grad()
def generate_ids(
    model: Writer,
    z: Tensor,
    begun: PackedText,
    *,
    max_length: int,
    temperature: float,
    top_p: float,
    generator: torch.Generator | None,
) -> Tensor:
    """Write a text for every latent -> (B, <= max_length) int64, EOS included, pad after it.

    model: runs without dropout.
    z (B, *latent.shape): (B, 0) for a model without a latent.
    begun: what the decoder has read of each row, up to the BOS of the response; on the device.
    max_length: tokens per text.
    temperature, top_p, generator: see `choose_token`.
    """
    backbone, tokens = model.backbone, model.tokens
    embedding = backbone.embedding_weight
    cache = DynamicCache(config=backbone.config)
    position = model.fill_prefix_cache(z, cache)
    # Start every row from its soft prompts and as many given tokens as every row has.
    given, _ = begun.to_padded(tokens.pad)
    lengths = begun.lengths.long()
    shortest = int(lengths.min())
    # The last token given is the response's BOS, its position 0.
    column = torch.arange(shortest, device=lengths.device) - (lengths - 1)[:, None]
    slots = model.slots_of(z)
    inputs = model.embed_at(given[:, :shortest], slots, column)
    inputs = torch.cat((model.soft_prompts(z), inputs), dim=1)
    finished = torch.zeros(len(z), dtype=torch.bool, device=embedding.device)
    counts, steps = torch.zeros_like(lengths), []
    # Append one token a step to every row: a given one while it has any, pad once it has ended.
    for place in range(shortest, given.shape[1] + max_length):
        hidden = backbone.decode_step(inputs, cache, position)
        position += inputs.shape[1]
        logits = F.linear(hidden[:, -1], backbone.head_weight)
        token = choose_token(logits, temperature, top_p, generator)
        token = torch.where(finished, tokens.pad, token)
        writes = lengths <= place
        if place < given.shape[1]:
            token = torch.where(writes, token, given[:, place])
        steps.append(token)
        counts += writes & ~finished
        finished = finished | (writes & (token == tokens.eos)) | (counts >= max_length)
        if bool(finished.all()):
            break
        inputs = model.embed_at(token[:, None], slots, (place - (lengths - 1))[:, None])
    # Rows began to write at different steps.
    start = (lengths - shortest)[:, None]
    column = start + torch.arange(int(counts.max()), device=start.device)
    text = torch.stack(steps, 1).gather(1, column.clamp(max=len(steps) - 1))
    return text.masked_fill(column >= start + counts[:, None], tokens.pad)
