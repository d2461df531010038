"""Text from latents: of given instructions, between two of them, or from the prior."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cdpvae.batch import PackedText
from cdpvae.evaluation.checkpoint import OpenedRun
from cdpvae.evaluation.options import GenerateOptions
from cdpvae.latents import GeneratorNoise


def write_from_latents(opened: OpenedRun, options: GenerateOptions) -> Iterator[tuple[str, str]]:
    """Yield a label and a text for every latent that the options ask for.

    Raises ValueError for a model without a latent.
    """
    model = opened.model
    if not model.latent.reads_text:
        raise ValueError(f"checkpoint={options.checkpoint!r} was trained with --latent none")
    # One generator draws z and samples tokens, so that a seed repeats both.
    generator = torch.Generator(device=model.device).manual_seed(options.seed)
    labels, z = _latents(opened, options, generator)
    ids = model.generate(
        z,
        max_length=options.max_length,
        temperature=options.temperature,
        top_p=options.top_p,
        generator=generator,
    )
    for label, row in zip(labels, ids.tolist(), strict=True):
        yield label, opened.tokenizer.decode(row)


@torch.no_grad()
def _latents(
    opened: OpenedRun, options: GenerateOptions, generator: torch.Generator
) -> tuple[list[str], Tensor]:
    """Return a label for every latent, and z (rows, *shape)."""
    model = opened.model
    if options.samples:
        z = model.latent.prior.sample(options.samples, GeneratorNoise(generator))
        return [f"z~p(z) {number + 1}:" for number in range(options.samples)], z
    # Encode the given texts; each is answered from the mean of its code.
    ids = [opened.tokenizer.encode_instruction(text) for text in options.text]
    z = model.latent.mean(model.infer(PackedText.from_lists(ids).to(model.device)))
    if not options.interpolate:
        return [f"{number + 1}:" for number in range(len(ids))], z
    path = model.interpolate(z[0], z[1], options.num_steps, options.mode)
    shares = [step / (options.num_steps - 1) for step in range(options.num_steps)]
    return [f"{share:.2f}:" for share in shares], path
