"""Rows of a split, encoded once: their codes, one z each, and their likelihood from any z.

Legend: N rows, K latents of one row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cdpvae.batch import PackedText
from cdpvae.evaluation.checkpoint import OpenedRun, RowSelection
from cdpvae.evaluation.likelihood import EVALUATION_EPOCH, backbone_nll, sequence_nll
from cdpvae.latents import Code
from cdpvae.models.text_vae import LlamaSoftPromptVAE

# Positions, prompts counted, of one decoder pass over many latents of one row: bounds the memory.
POSITIONS_AT_ONCE = 8192


@dataclass(frozen=True)
class EncodedRows:
    """N rows and what the encoder made of them; every tensor on the CPU.

    model: that decodes them.
    responses, instructions: the token ids of each row.
    sample_index (N,) int64: of each row in the data set; keys its noise.
    code: q(z|x) of all rows.
    z (N, *latent.shape): one draw of each, the same as in `evaluate_likelihood`.
    rows_per_batch: decoded together.
    """

    model: LlamaSoftPromptVAE
    responses: list[list[int]]
    instructions: list[list[int]]
    sample_index: Tensor
    code: Code
    z: Tensor
    rows_per_batch: int

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.responses)

    def select(self, indices: Tensor) -> EncodedRows:
        """Return the rows at `indices` (M,), in that order."""
        return EncodedRows(
            model=self.model,
            responses=[self.responses[index] for index in indices.tolist()],
            instructions=[self.instructions[index] for index in indices.tolist()],
            sample_index=self.sample_index[indices],
            code=self.code.map(lambda tensor: tensor[indices]),
            z=self.z[indices],
            rows_per_batch=self.rows_per_batch,
        )

    def choose(self, count: int | None, *, seed: int) -> Tensor:
        """Choose rows at random, all for None or a larger count -> ascending indices (M,)."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(self.num_rows, generator=generator)[:count].sort().values

    def kl(self) -> Tensor | None:
        """Return KL(q(z|x) || p(z)) of each row -> (N,) fp64 nats; None for a family without."""
        rate = self.model.latent.penalties(self.code.to(torch.float64)).get("kl")
        return None if rate is None else rate.reshape(self.num_rows, -1).sum(1)

    @cached_property
    def own_nll(self) -> Tensor:
        """-log p(response | z) of each row from its own draw -> (N,) fp64 nats; computed once."""
        return self.nll(self.z)

    def texts(self, start: int) -> tuple[PackedText, PackedText]:
        """Return responses and instructions of the batch from row `start` on, on the device."""
        chosen, device = slice(start, start + self.rows_per_batch), self.model.device
        sides = (self.responses[chosen], self.instructions[chosen])
        response, instruction = (PackedText.from_lists(side).to(device) for side in sides)
        return response, instruction

    def nll(self, z: Tensor) -> Tensor:
        """Return -log p(response | z) of each row -> (N,) fp64 nats. z (N, *latent.shape)."""
        step = self.rows_per_batch
        parts = [
            self._decode(z[start : start + step], *self.texts(start))
            for start in range(0, self.num_rows, step)
        ]
        return torch.cat(parts)

    def backbone_nll(self, with_instruction: bool = False) -> Tensor:
        """Return -log p(response) of each row by the backbone itself -> (N,) fp64 nats.

        with_instruction: whether it reads the instruction first.
        """
        parts = []
        with self.model.evaluating():
            for start in range(0, self.num_rows, self.rows_per_batch):
                response, instruction = self.texts(start)
                read = instruction if with_instruction else None
                parts.append(backbone_nll(self.model, response, read).double().cpu())
        return torch.cat(parts)

    def nll_of_draws(self, row: int, z: Tensor) -> Tensor:
        """Return -log p(response | z_k) of one row for many latents -> (K,) fp64 nats.

        row: which. z (K, *latent.shape): decoded as copies of the row, packed together.
        """
        # Every copy repeats all that the decoder reads.
        response, instruction = self.responses[row], self.instructions[row]
        read = len(instruction) if self.model.config.reads_instruction else 0
        step = max(1, POSITIONS_AT_ONCE // (read + len(response) + self.model.num_prompts))
        device, parts = self.model.device, []
        for part in z.split(step):
            copies = (PackedText.from_lists([ids] * len(part)) for ids in (response, instruction))
            parts.append(self._decode(part, *(text.to(device) for text in copies)))
        return torch.cat(parts)

    @torch.no_grad()
    def _decode(self, z: Tensor, response: PackedText, instruction: PackedText) -> Tensor:
        with self.model.evaluating():
            nll = sequence_nll(self.model, z.to(self.model.device), response, instruction)
        return nll.double().cpu()


@torch.no_grad()
def encode_rows(
    opened: OpenedRun,
    rows: RowSelection,
    *,
    seed: int,
    progress: Callable[[str], None],
) -> EncodedRows:
    """Run the encoder once over every row.

    opened: the run.
    rows: which ones.
    seed: of z ~ q(z|x).
    progress: told a line at the start.

    Raises ValueError for an empty split.
    """
    model, latent = opened.model, opened.model.latent
    batches = opened.rows(rows)
    if not batches:
        raise ValueError("no row to evaluate: the split is empty")
    progress(f"encoding {sum(batch.num_rows for batch in batches)} rows")
    # The draws are those of `evaluate_likelihood`: the same stream, keyed by seed and row.
    codes, draws = [], []
    with model.evaluating():
        for batch in batches:
            moved = batch.to(model.device)
            code = model.infer(moved.instruction)
            noise = model.training_noise(moved.sample_index, seed=seed, epoch=EVALUATION_EPOCH)
            draws.append(latent.sample(code, noise).cpu())
            codes.append(code.map(Tensor.cpu))
    return EncodedRows(
        model=model,
        responses=[ids.tolist() for batch in batches for ids in batch.response.rows()],
        instructions=[ids.tolist() for batch in batches for ids in batch.instruction.rows()],
        sample_index=torch.cat([batch.sample_index for batch in batches]),
        code=type(codes[0]).concat(codes),
        z=torch.cat(draws),
        rows_per_batch=max(batch.num_rows for batch in batches),
    )
