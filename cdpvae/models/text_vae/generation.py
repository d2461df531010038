"""From latents to text, and ways through the latent space.

Generation starts from the soft prompts (and the deep prefix) of z plus `[BOS]`, keeps a key/value
cache, and stops at EOS. All rows of a batch have the same length at every step, so nothing is
padded.

Legend: B rows, Z latent, D hidden, V vocabulary, S interpolation steps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache


def choose_token(
    logits_BV: Tensor, temperature: float, top_p: float, generator: torch.Generator | None = None
) -> Tensor:
    """The next token of every row -> (B,) int64.

    temperature 0 is greedy. top_p keeps the smallest set of tokens whose probability reaches it
    (nucleus sampling, Holtzman et al. 2020). Raises ValueError outside temperature >= 0 and
    0 < top_p <= 1.
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
    chosen = torch.multinomial(sorted_p, 1, generator=generator)
    return order.gather(1, chosen).squeeze(1)


@torch.no_grad()
def generate_ids(
    model,
    z: Tensor | None,
    *,
    num_rows: int,
    max_length: int,
    temperature: float,
    top_p: float,
    generator: torch.Generator | None,
) -> Tensor:
    """-> (B, <= max_length) int64, EOS included, pad after it. `z` None: a model without latent."""
    backbone, tokens = model.backbone, model.tokens
    embedding = backbone.embedding_weight
    cache = DynamicCache(config=backbone.config)
    position = model.fill_prefix_cache(z, cache)
    bos = torch.full((num_rows, 1), tokens.bos, device=embedding.device)
    inputs = F.embedding(bos, embedding)
    if z is not None:
        inputs = torch.cat((model.projector(z).to(embedding.dtype), inputs), dim=1)
    finished = torch.zeros(num_rows, dtype=torch.bool, device=embedding.device)
    written: list[Tensor] = []
    for _ in range(max_length):
        hidden = backbone.decode_step(inputs, cache, position)
        position += inputs.shape[1]
        logits = F.linear(hidden[:, -1], backbone.head_weight)
        token = choose_token(logits, temperature, top_p, generator)
        token = torch.where(finished, tokens.pad, token)
        written.append(token)
        finished = finished | (token == tokens.eos)
        if bool(finished.all()):
            break
        inputs = F.embedding(token[:, None], embedding)
    return torch.stack(written, dim=1)


def interpolate(z1: Tensor, z2: Tensor, num_steps: int = 10, mode: str = "linear") -> Tensor:
    """A way from z1 to z2, ends included: (Z,) -> (S, Z), (B, Z) -> (S, B, Z).

    `slerp` turns the direction at constant angular speed and interpolates the length linearly
    (Shoemake 1985; White 2016): the middle of two Gaussian samples keeps a typical length.
    Raises ValueError for differing shapes, num_steps < 2 or an unknown mode.
    """
    if z1.shape != z2.shape:
        raise ValueError(f"z1 {tuple(z1.shape)} and z2 {tuple(z2.shape)} must have one shape")
    if num_steps < 2 or mode not in ("linear", "slerp"):
        raise ValueError(
            f"num_steps={num_steps} must be at least 2 and mode={mode!r} 'linear' or 'slerp'"
        )
    steps = torch.linspace(0, 1, num_steps, device=z1.device, dtype=z1.dtype)
    t = steps.view(-1, *([1] * z1.dim()))
    if mode == "linear":
        return torch.lerp(z1[None], z2[None], t)
    length1, length2 = z1.norm(dim=-1, keepdim=True), z2.norm(dim=-1, keepdim=True)
    unit1, unit2 = F.normalize(z1, dim=-1), F.normalize(z2, dim=-1)
    cosine = (unit1 * unit2).sum(-1, keepdim=True).clamp(-1, 1)
    angle = torch.acos(cosine)
    sine = torch.sin(angle)
    turned = (torch.sin((1 - t) * angle) * unit1 + torch.sin(t * angle) * unit2) / sine
    # Parallel or opposite directions have no arc: fall back to the straight line.
    direction = torch.where(sine.abs() > 1e-6, turned, torch.lerp(unit1[None], unit2[None], t))
    return direction * torch.lerp(length1[None], length2[None], t)
