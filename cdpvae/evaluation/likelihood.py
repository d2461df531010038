"""How well a model explains held-out text, and whether it uses z to do so.

All likelihoods are nats per sequence, dropout and word dropout off. The z-use test replaces z by
another row's, by a prior draw and by zero: a decoder that ignores z loses nothing, however many
units look active.

Legend: B rows, N target positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cdpvae.batch import PackedText, VAEBatch, next_token_targets
from cdpvae.latents import Code, KeyedNoise
from cdpvae.latents.gaussian import ACTIVE_VARIANCE
from cdpvae.models.text_vae import LlamaSoftPromptVAE
from cdpvae.models.text_vae.decoder_text import DecoderText
from cdpvae.models.text_vae.packing import Packing
from cdpvae_kernels import Stream, linear_cross_entropy

# Evaluation noise must not repeat what training drew for the same rows.
EVALUATION_EPOCH = 2**20


@dataclass(frozen=True)
class LikelihoodSums:
    """Sums over rows in fp64; they add up over batches and ranks.

    rows, tokens: how many, tokens being target tokens.
    nll_q, nll_mu: nats from z ~ q(z|x), one sample, and from the code's mean.
    kl: the rate, not clamped.
    replaced: rows of the z-use test; a batch of one row has no other row to take z from.
    nll_replaced: their nats from z ~ q(z|x).
    shuffled, prior, zero: their nats from another row's z, a prior draw, and zero.
    """

    rows: float = 0.0
    tokens: float = 0.0
    nll_q: float = 0.0
    nll_mu: float = 0.0
    kl: float = 0.0
    replaced: float = 0.0
    nll_replaced: float = 0.0
    shuffled: float = 0.0
    prior: float = 0.0
    zero: float = 0.0

    def __add__(self, other: LikelihoodSums) -> LikelihoodSums:
        """Add field by field."""
        pairs = zip(asdict(self).items(), asdict(other).values(), strict=True)
        return LikelihoodSums(**{name: mine + theirs for (name, mine), theirs in pairs})

    def all_reduce(
        self, reduce: Callable[[Tensor], Tensor], device: torch.device
    ) -> LikelihoodSums:
        """Return the sums over all ranks. reduce: sums a tensor over them."""
        mine = torch.tensor(list(asdict(self).values()), dtype=torch.float64, device=device)
        names = [part.name for part in fields(self)]
        return LikelihoodSums(**dict(zip(names, reduce(mine).tolist(), strict=True)))


@dataclass(frozen=True)
class Likelihood:
    """Means over rows, nats per sequence; `tokens` is the mean number of target tokens.

    nll_q: z ~ q(z|x), one sample. nll_mu: z is the code's mean. kl: KL(q(z|x) || p(z)).
    neg_elbo: nll_q + kl, an upper bound on -log p(x) in expectation.
    costs: nats lost when z is replaced by another row's, a prior draw, or zero, by name.
    health: the latent family's own figures over the rows.
    A model without a latent has nll_q = nll_mu = neg_elbo, kl = 0, no costs and no health.
    """

    rows: int
    tokens: float
    nll_q: float
    nll_mu: float
    kl: float
    neg_elbo: float
    costs: dict[str, float]
    health: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, sums: LikelihoodSums, health: dict[str, float]) -> Likelihood:
        """Make means of sums. Raises ValueError when no row was evaluated."""
        rows = sums.rows
        if rows == 0:
            raise ValueError("no row to evaluate: the split is empty")
        # A cost is the difference over the same rows, so that left-out rows do not enter it.
        costs = {}
        if sums.replaced:
            costs = {
                name: (getattr(sums, name) - sums.nll_replaced) / sums.replaced
                for name in ("shuffled", "prior", "zero")
            }
        return cls(
            rows=int(rows),
            tokens=sums.tokens / rows,
            nll_q=sums.nll_q / rows,
            nll_mu=sums.nll_mu / rows,
            kl=sums.kl / rows,
            neg_elbo=(sums.nll_q + sums.kl) / rows,
            costs=costs,
            health=health,
        )

    def to_json(self) -> dict[str, Any]:
        """Return all figures, those of the family beside the others."""
        content = asdict(self)
        health = content.pop("health")
        return {**content, **health}


def sequence_nll(
    model: LlamaSoftPromptVAE,
    z: Tensor,
    response: PackedText,
    instruction: PackedText | None = None,
) -> Tensor:
    """Return -log p(response | what the decoder reads) of each row -> (B,) fp32 nats.

    model: that decodes.
    z (B, *latent.shape): latents.
    response: of each row.
    instruction: of each row, as in `LlamaSoftPromptVAE.decode`.
    """
    # Decode without word dropout.
    decoded = model.decode(z, response.ids, response, instruction)
    return _nll_of_rows(model, decoded.hidden, decoded.positions, response)


@torch.no_grad()
def backbone_nll(
    model: LlamaSoftPromptVAE, response: PackedText, instruction: PackedText | None = None
) -> Tensor:
    """Return -log p(response) of each row by the backbone itself -> (B,) fp32 nats.

    Without LoRA, soft prompts and z: what the decoder knew before it was tuned.
    instruction: read before the response whatever the decoder reads; None for nothing.
    """
    backbone = model.backbone
    read = DecoderText.of(response.ids, response, instruction)
    text = read.text
    packing = Packing.of(text.cu_seqlens, text.ids.numel(), text.max_len)
    with backbone.lora_off():
        hidden = backbone.decode(F.embedding(text.ids, backbone.embedding_weight), packing)
    return _nll_of_rows(model, hidden, read.positions, response)


def _nll_of_rows(
    model: LlamaSoftPromptVAE, hidden: Tensor, positions: Tensor, response: PackedText
) -> Tensor:
    """Return the NLL of each row (B,) of decoded states.

    model: whose head predicts.
    hidden (T', D): of the decoder, prompts included where there are any.
    positions (T,): where each position of the response is in `hidden`.
    response: of B rows and T tokens.
    """
    # Take the loss of every target by itself.
    target_positions, targets = next_token_targets(response)
    _, stats = linear_cross_entropy(
        hidden,
        model.backbone.head_weight,
        targets,
        positions=positions[target_positions],
        divisor=1,
        ignore_index=None,
        return_stats=True,
        impl=model.impl,
    )
    # Add up the targets of each row.
    nll = stats.nll.new_zeros(response.num_rows)
    return nll.index_add(0, row_of_targets(response), stats.nll)


def row_of_targets(response: PackedText) -> Tensor:
    """Return the row that each target position belongs to, (N,)."""
    predicting = response.lengths.long() - 1
    rows = torch.arange(response.num_rows, device=response.ids.device)
    return torch.repeat_interleave(rows, predicting)


@torch.no_grad()
def measure_batches(
    model: LlamaSoftPromptVAE, batches: Iterable[VAEBatch], *, seed: int, z_use: bool = True
) -> tuple[LikelihoodSums, Code | None]:
    """Return sums over the rows of the batches, and their codes on the CPU.

    model: in whatever mode; it is evaluated without dropout.
    batches: packed rows.
    seed: keys posterior noise and prior draws.
    z_use: also replace z.

    No batch gives no code.
    """
    total, codes = LikelihoodSums(), []
    with model.evaluating():
        for batch in batches:
            sums, code = _measure_batch(model, batch.to(model.device), seed, z_use)
            total = total + sums
            codes.append(code.map(Tensor.cpu))
    return total, type(codes[0]).concat(codes) if codes else None


def _measure_batch(
    model: LlamaSoftPromptVAE, batch: VAEBatch, seed: int, z_use: bool
) -> tuple[LikelihoodSums, Code]:
    latent, response, index = model.latent, batch.response, batch.sample_index

    def nll(z: Tensor) -> float:
        return float(sequence_nll(model, z, response, batch.instruction).double().sum())

    # Likelihoods from the posterior, by a sample and by its mean.
    code = model.infer(batch.instruction)
    z = latent.sample(code, model.training_noise(index, seed=seed, epoch=EVALUATION_EPOCH))
    counts = {"rows": batch.num_rows, "tokens": float((response.lengths - 1).sum())}
    nll_q = nll(z)
    if not z[0].numel():
        return LikelihoodSums(**counts, nll_q=nll_q, nll_mu=nll_q), code
    rate = latent.penalties(code).get("kl")
    kl = 0.0 if rate is None else float(rate.double().sum())
    sums = LikelihoodSums(**counts, nll_q=nll_q, nll_mu=nll(latent.mean(code)), kl=kl)
    if not z_use or batch.num_rows < 2:
        return sums, code
    # The z-use test: the same rows from a z that is not theirs.
    noise = KeyedNoise(seed, Stream.PRIOR, index, 0)
    replaced = LikelihoodSums(
        replaced=batch.num_rows,
        nll_replaced=nll_q,
        shuffled=nll(z.roll(1, 0)),
        prior=nll(latent.prior.sample(batch.num_rows, noise)),
        zero=nll(torch.zeros_like(z)),
    )
    return sums + replaced, code


def evaluate_likelihood(
    model: LlamaSoftPromptVAE, batches: Iterable[VAEBatch], *, seed: int, z_use: bool = True
) -> Likelihood:
    """Return the `Likelihood` of one process over its batches.

    model, batches, seed, z_use: as in `measure_batches`.
    """
    sums, code = measure_batches(model, batches, seed=seed, z_use=z_use)
    return Likelihood.of(sums, health_of(model, code, seed=seed))


def health_of(model: LlamaSoftPromptVAE, code: Code | None, *, seed: int) -> dict[str, float]:
    """Return the family's figures over held-out rows; empty for fewer than two."""
    if code is None or code.num_rows < 2:
        return {}
    return model.latent.health(code, seed=seed, active_variance=ACTIVE_VARIANCE)
