"""Text from latents: of given instructions, between two of them, or from the prior."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cdpvae.batch import PackedText
from cdpvae.evaluation.checkpoint import OpenedRun, refuse_without_instruction
from cdpvae.evaluation.options import GenerateOptions
from cdpvae.latents import GeneratorNoise


def write_from_latents(opened: OpenedRun, options: GenerateOptions) -> Iterator[tuple[str, str]]:
    """Yield a label and a text for every latent that the options ask for.

    Raises ValueError for a model that has neither a latent nor an instruction to write from.
    """
    model = opened.model
    if options.samples or options.interpolate:
        flag = "--samples" if options.samples else "--interpolate"
        refuse_without_instruction(opened, flag)
    if not (model.latent.reads_text or model.config.reads_instruction):
        raise ValueError(f"checkpoint={options.checkpoint!r} was trained with --latent none")
    # One generator draws z and samples tokens, so that a seed repeats both.
    generator = torch.Generator(device=model.device).manual_seed(options.seed)
    ids = [opened.tokenizer.encode_instruction(text) for text in options.text]
    given = PackedText.from_lists(ids).to(model.device) if ids else None
    labels, z = _latents(opened, options, given, generator)
    written = model.generate(
        z,
        max_length=options.max_length,
        temperature=options.temperature,
        top_p=options.top_p,
        instruction=given,
        generator=generator,
    )
    for label, row in zip(labels, written.tolist(), strict=True):
        yield label, opened.tokenizer.decode(row)


@torch.no_grad()
def _latents(
    opened: OpenedRun,
    options: GenerateOptions,
    given: PackedText | None,
    generator: torch.Generator,
) -> tuple[list[str], Tensor]:
    """Return a label for every latent, and z (rows, *shape).

    opened: the run.
    options: of the command.
    given: the texts to encode, None for samples.
    generator: of prior draws.
    """
    model = opened.model
    if given is None:
        z = model.latent.prior.sample(options.samples, GeneratorNoise(generator))
        return [f"z~p(z) {number + 1}:" for number in range(options.samples)], z
    # Encode the given texts; each is answered from the mean of its code.
    z = model.latent.mean(model.infer(given))
    if not options.interpolate:
        return [f"{number + 1}:" for number in range(given.num_rows)], z
    path = model.interpolate(z[0], z[1], options.num_steps, options.mode)
    shares = [step / (options.num_steps - 1) for step in range(options.num_steps)]
    return [f"{share:.2f}:" for share in shares], path
